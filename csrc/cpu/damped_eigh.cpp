// Eigendecompositions of F_i + damping_i I for a ragged list, through torch's own LAPACK, or by refining a basis that
// is given.
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/refine_eigenbasis.h"

namespace kronfac::cpu {
namespace {

constexpr const char* kOp = "damped_eigh";

// The lower triangle is all that is read.
template <class T>
bool lower_is_finite(const T* f, int64_t n, int64_t row_stride, int64_t col_stride) {
  int bad = 0;  // a flag, because the additions of a sum would wait for one another
  const bool by_rows = col_stride <= row_stride;
  for (int64_t a = 0; a < n; ++a) {
    const int64_t first = by_rows ? 0 : a, last = by_rows ? a + 1 : n;
    const T* line = f + a * (by_rows ? row_stride : col_stride);
    const int64_t step = by_rows ? col_stride : row_stride;
    for (int64_t b = first; b < last; ++b) bad |= !(line[b * step] - line[b * step] == 0);
  }
  return bad == 0;
}

// From this order on refining a basis is faster than LAPACK, where it succeeds.
constexpr int64_t kRefineOrder = 128;

struct Problem {
  Tensor matrix;  // a plain view of the factor: worker threads have no grad mode of their caller
  int64_t n, row_stride, col_stride;
  const void* data;
  double damping;
  bool warm = false;
  kernels::Matrix basis{};
};

struct Solution {
  Tensor values;
  Tensor vectors;
  int32_t info = 0;
};

// What a worker needs to refine a basis; null without warm starts.
struct Workspace {
  std::byte *refinement = nullptr, *gemm = nullptr;
  int64_t gemm_bytes = 0;
};

// Eigenvectors are column-major, as LAPACK leaves them.
Tensor empty_columns(int64_t n, ScalarType type) {
  Tensor storage = torch::stable::empty({n, n}, type);
  return torch::stable::transpose(storage, 0, 1);
}

// Calls aten::linalg_eigh; false when it failed. Never throws: it runs inside parallel regions.
bool solve(const Tensor& matrix, Tensor& values, Tensor& vectors) noexcept {
  try {
    namespace detail = torch::stable::detail;
    std::array<StableIValue, 2> stack{detail::from(matrix), detail::from(std::string("L"))};
    if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION) != 0) return false;
    values = detail::to<Tensor>(stack[0]);
    vectors = detail::to<Tensor>(stack[1]);
    return true;
  } catch (...) {
    return false;
  }
}

// values[i] + damping, floored: rounding may leave an eigenvalue of a positive semi-definite matrix just below zero.
template <class T>
int32_t shift_values(const T* from, int64_t n, double damping, T* values) {
  const T shift = static_cast<T>(damping);
  int32_t info = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(from[i])) info = 1;
    values[i] = std::max(from[i] + shift, shift);
  }
  return info;
}

template <class T>
void diagonalize(const Problem& problem, Solution& solution, int64_t threads, const Workspace& workspace) {
  const int64_t n = problem.n;
  const T* f = static_cast<const T*>(problem.data);
  bool solved = false;
  if (problem.warm) {
    const ParallelGemm<T> gemm(threads, workspace.gemm, workspace.gemm_bytes);
    solved = EigenbasisRefinement<T>(gemm, n, workspace.refinement)
                 .run(f, problem.row_stride, problem.col_stride, problem.basis,
                      static_cast<T*>(solution.values.mutable_data_ptr()),
                      static_cast<T*>(solution.vectors.mutable_data_ptr()));
  }
  if (!solved && !lower_is_finite(f, n, problem.row_stride, problem.col_stride)) {
    solution.info = -1;
    return;
  }
  if (!solved && !solve(problem.matrix, solution.values, solution.vectors)) {
    solution.info = 1;
    return;
  }
  T* values = static_cast<T*>(solution.values.mutable_data_ptr());
  solution.info = shift_values(values, n, problem.damping, values);
}

// Equal sizes up to this order are solved by one call of linalg_eigh for several: below it the call costs more than the
// copies.
constexpr int64_t kBatchOrder = 128;

// Several matrices of one order, whose solutions are allocated. False when LAPACK failed for one of them.
template <class T>
bool diagonalize_batch(const std::vector<Problem>& problems, const std::vector<int64_t>& batch,
                       std::vector<Solution>& solutions, ScalarType type) noexcept {
  try {
    const int64_t n = problems[static_cast<size_t>(batch[0])].n, count = static_cast<int64_t>(batch.size());
    const Tensor storage = torch::stable::empty({count, n, n}, type);
    T* matrices = static_cast<T*>(storage.mutable_data_ptr());
    for (size_t b = 0; b < batch.size(); ++b) {
      const size_t at = static_cast<size_t>(batch[b]);
      const Problem& p = problems[at];
      const T* f = static_cast<const T*>(p.data);
      T* target = matrices + static_cast<int64_t>(b) * n * n;
      solutions[at].info = lower_is_finite(f, n, p.row_stride, p.col_stride) ? 0 : -1;
      // Column-major, as LAPACK wants it; in place of a matrix that is not finite, zeros.
      std::fill(target, target + n * n, T(0));
      if (solutions[at].info != 0) continue;
      constexpr int64_t kTile = 16;  // reads and writes of a tile stay in L1
      for (int64_t jb = 0; jb < n; jb += kTile) {
        for (int64_t ib = jb; ib < n; ib += kTile) {
          for (int64_t i = ib; i < std::min(ib + kTile, n); ++i) {
            for (int64_t j = jb; j < std::min(jb + kTile, i + 1); ++j)
              target[j * n + i] = f[i * p.row_stride + j * p.col_stride];
          }
        }
      }
    }
    Tensor values, vectors;
    if (!solve(torch::stable::transpose(storage, 1, 2), values, vectors)) return false;
    const T* all_values = static_cast<const T*>(values.const_data_ptr());
    const T* all_vectors = static_cast<const T*>(vectors.const_data_ptr());
    if (values.stride(1) != 1 || vectors.stride(1) != 1 || vectors.stride(2) != n) return false;
    for (size_t b = 0; b < batch.size(); ++b) {
      const size_t at = static_cast<size_t>(batch[b]);
      const int64_t offset = static_cast<int64_t>(b);
      if (solutions[at].info != 0) continue;
      solutions[at].info = shift_values(all_values + offset * values.stride(0), n, problems[at].damping,
                                        static_cast<T*>(solutions[at].values.mutable_data_ptr()));
      const T* from = all_vectors + offset * vectors.stride(0);
      std::copy(from, from + n * n, static_cast<T*>(solutions[at].vectors.mutable_data_ptr()));
    }
    return true;
  } catch (...) {
    return false;
  }
}

// Lists of matrices that one task solves: single ones, or up to an even share of those of one small order.
std::vector<std::vector<int64_t>> batches(const std::vector<Problem>& problems, int64_t threads) {
  constexpr int64_t kBatchesPerThread = 2;  // a second one to balance threads that are not equally fast
  std::map<int64_t, std::vector<int64_t>> by_order;
  std::vector<std::vector<int64_t>> result;
  for (size_t i = 0; i < problems.size(); ++i) {
    if (problems[i].n == 0) continue;
    if (problems[i].warm || problems[i].n > kBatchOrder) {
      result.push_back({static_cast<int64_t>(i)});
    } else {
      by_order[problems[i].n].push_back(static_cast<int64_t>(i));
    }
  }
  for (const auto& [n, members] : by_order) {
    const int64_t count = static_cast<int64_t>(members.size()),
                  parts = std::min(count, threads == 1 ? 1 : threads * kBatchesPerThread);
    for (int64_t part = 0; part < parts; ++part) {
      result.emplace_back(members.begin() + part * count / parts, members.begin() + (part + 1) * count / parts);
    }
  }
  return result;
}

// Outputs of a matrix without a decomposition.
void fill_with_nan(Solution& solution, int64_t n, ScalarType type) {
  solution.values = torch::stable::empty({n}, type);
  solution.vectors = empty_columns(n, type);
  torch::stable::fill_(solution.values, std::numeric_limits<double>::quiet_NaN());
  torch::stable::fill_(solution.vectors, std::numeric_limits<double>::quiet_NaN());
}

using Result = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

Result damped_eigh(std::vector<Tensor> factors, Tensor damping, std::optional<std::vector<Tensor>> basis) {
  check_wide(kOp, "damping", damping);
  const ScalarType type = damping.scalar_type();
  for (size_t i = 0; i < factors.size(); ++i) {
    check_square(kOp, item("factors", i), factors[i]);
    check_dtype(kOp, item("factors", i), factors[i], type, "the type of damping");
    check_device(kOp, item("factors", i), factors[i], damping, "damping");
  }
  if (basis) {
    check_length(kOp, "basis", *basis, factors.size(), "factors");
    for (size_t i = 0; i < factors.size(); ++i) {
      const Tensor& q = (*basis)[i];
      const Arg arg = item("basis", i);
      check_square(kOp, arg, q);
      check_dtype(kOp, arg, q, type, "the type of damping");
      check_device(kOp, arg, q, damping, "damping");
      STD_TORCH_CHECK(q.size(0) == factors[i].size(0), "kronfac::", kOp, ": ", arg, ": expected the shape of ",
                      item("factors", i), " ", shape_string(factors[i]), ", got ", shape_string(q));
    }
  }
  const std::vector<double> shifts = read_damping(kOp, damping, factors.size());

  const int64_t threads = thread_count();
  std::vector<Problem> problems;
  std::vector<Solution> solutions(factors.size());
  std::vector<double> costs;
  double remaining = 0;
  int64_t largest_warm = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor& f = factors[i];
    const int64_t n = f.size(0);
    const std::array<int64_t, 2> sizes{n, n}, strides{f.stride(0), f.stride(1)};
    const Tensor view =
        torch::stable::from_blob(const_cast<void*>(f.const_data_ptr()), sizes, strides, f.device(), type);
    problems.push_back({view, n, f.stride(0), f.stride(1), f.const_data_ptr(), shifts[i]});
    if (basis && n >= kRefineOrder) {
      problems.back().warm = true;
      problems.back().basis = matrix_of((*basis)[i]);
      largest_warm = std::max(largest_warm, n);
    }
    if (n <= kBatchOrder || problems.back().warm)
      solutions[i] = {torch::stable::empty({n}, type), empty_columns(n, type)};
  }
  const std::vector<std::vector<int64_t>> tasks = batches(problems, threads);
  for (const std::vector<int64_t>& task : tasks) {
    const double n = static_cast<double>(problems[static_cast<size_t>(task[0])].n);
    costs.push_back(n * n * n * static_cast<double>(task.size()));
    remaining += costs.back();
  }

  const bool wide = type == ScalarType::Double;
  const int64_t refinement_bytes = wide ? EigenbasisRefinement<double>::workspace_bytes(largest_warm)
                                        : EigenbasisRefinement<float>::workspace_bytes(largest_warm);
  const int64_t gemm_bytes =
      wide ? ParallelGemm<double>::scratch_bytes(largest_warm) : ParallelGemm<float>::scratch_bytes(largest_warm);
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(tasks.size())));
  const Scratch refinement(refinement_bytes * workers), gemm(gemm_bytes * threads);
  const auto run = [&](int64_t task, int64_t worker, int64_t inner_threads) {
    const std::vector<int64_t>& members = tasks[static_cast<size_t>(task)];
    if (members.size() > 1 && (wide ? diagonalize_batch<double>(problems, members, solutions, type)
                                    : diagonalize_batch<float>(problems, members, solutions, type))) {
      return;
    }
    const Workspace workspace{refinement.at<std::byte>(worker * refinement_bytes),
                              gemm.at<std::byte>(worker * gemm_bytes), gemm_bytes};
    for (const int64_t i : members) {
      const size_t at = static_cast<size_t>(i);
      solutions[at].info = 0;
      if (wide) {
        diagonalize<double>(problems[at], solutions[at], inner_threads, workspace);
      } else {
        diagonalize<float>(problems[at], solutions[at], inner_threads, workspace);
      }
    }
  };
  // A matrix with more than an even share of the work runs alone, with LAPACK's own threads; the rest side by side.
  std::vector<int64_t> order = largest_first(costs);
  size_t alone = 0;
  while (threads > 1 && alone < order.size() && tasks[static_cast<size_t>(order[alone])].size() == 1 &&
         costs[static_cast<size_t>(order[alone])] * static_cast<double>(threads) > remaining) {
    remaining -= costs[static_cast<size_t>(order[alone])];
    run(order[alone++], 0, threads);
  }
  order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(alone));
  run_tasks(order, workers, [&](int64_t i, int64_t worker) { run(i, worker, 1); });

  Result result{{}, {}, torch::stable::empty({static_cast<int64_t>(factors.size())}, ScalarType::Int)};
  auto& [values, vectors, info] = result;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (solutions[i].info != 0) fill_with_nan(solutions[i], problems[i].n, type);
    values.push_back(solutions[i].values);
    vectors.push_back(solutions[i].vectors);
    info.mutable_data_ptr<int32_t>()[i] = solutions[i].info;
  }
  return result;
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "damped_eigh", TORCH_BOX(&kronfac::cpu::damped_eigh));
}
