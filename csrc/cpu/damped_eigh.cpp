// Eigendecompositions of F_i + damping_i I for a ragged list, through torch's own LAPACK, or by refining a basis that
// is given.
#include <array>
#include <limits>
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
  T defect = 0;
  const bool by_rows = col_stride <= row_stride;
  for (int64_t a = 0; a < n; ++a) {
    const int64_t first = by_rows ? 0 : a, last = by_rows ? a + 1 : n;
    const T* line = f + a * (by_rows ? row_stride : col_stride);
    const int64_t step = by_rows ? col_stride : row_stride;
    for (int64_t b = first; b < last; ++b) defect += line[b * step] - line[b * step];
  }
  return defect == 0;
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
  const T damping = static_cast<T>(problem.damping);
  T* values = static_cast<T*>(solution.values.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[i])) solution.info = 1;
    // Floored, because rounding may leave an eigenvalue of a positive semi-definite matrix just below zero.
    values[i] = std::max(values[i] + damping, damping);
  }
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
      const std::string arg = item("basis", i);
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
    if (n == 0 || problems.back().warm) solutions[i] = {torch::stable::empty({n}, type), empty_columns(n, type)};
    costs.push_back(static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n));
    remaining += costs.back();
  }

  const bool wide = type == ScalarType::Double;
  const int64_t refinement_bytes = wide ? EigenbasisRefinement<double>::workspace_bytes(largest_warm)
                                        : EigenbasisRefinement<float>::workspace_bytes(largest_warm);
  const int64_t gemm_bytes =
      wide ? ParallelGemm<double>::scratch_bytes(largest_warm) : ParallelGemm<float>::scratch_bytes(largest_warm);
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(factors.size())));
  const Scratch refinement(refinement_bytes * workers), gemm(gemm_bytes * threads);
  const auto run = [&](int64_t i, int64_t worker, int64_t inner_threads) {
    const size_t at = static_cast<size_t>(i);
    if (problems[at].n == 0) return;
    const Workspace workspace{refinement.at<std::byte>(worker * refinement_bytes),
                              gemm.at<std::byte>(worker * gemm_bytes), gemm_bytes};
    if (wide) {
      diagonalize<double>(problems[at], solutions[at], inner_threads, workspace);
    } else {
      diagonalize<float>(problems[at], solutions[at], inner_threads, workspace);
    }
  };
  // A matrix with more than an even share of the work runs alone, with LAPACK's own threads; the rest side by side.
  std::vector<int64_t> order = largest_first(costs);
  size_t alone = 0;
  while (threads > 1 && alone < order.size() &&
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

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) { m.impl("damped_eigh", TORCH_BOX(&kronfac::cpu::damped_eigh)); }
