// Eigendecompositions of F_i + damping_i I for a ragged list: several small matrices of one order in the lanes of a
// vector, larger ones through torch's own LAPACK or by refining a basis that is given.
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "common/arguments.h"
#include "common/linalg_eigh.h"
#include "cpu/refine_eigenbasis.h"
#include "kernels/batch_eigh.h"

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
    if (step == 1) {  // by whole vectors
      for (int64_t b = first; b < last; ++b) bad |= !(line[b] - line[b] == 0);
    } else {
      for (int64_t b = first; b < last; ++b) bad |= !(line[b * step] - line[b * step] == 0);
    }
  }
  return bad == 0;
}

// From this order on refining a basis is faster than LAPACK, where it succeeds.
constexpr int64_t kRefineOrder = 128;

// From this order on LAPACK is given the upper triangle of the transpose. It is the same triangle, but contiguous rows
// become the columns that it works on by plain copies, and MKL reduces upper triangles faster (1.02 to 1.2 times the
// speed of the whole from 240 on, less than 1 below).
constexpr int64_t kUpperOrder = 256;

struct Problem {
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

// One call of the C interface: torch::stable::empty goes through the dispatcher, which is most of the time of a tiny
// matrix.
template <size_t dimensions>
Tensor empty_strided(const std::array<int64_t, dimensions>& sizes, const std::array<int64_t, dimensions>& strides,
                     ScalarType type) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(),
                               type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_vector(int64_t n, ScalarType type) {
  return empty_strided(std::array<int64_t, 1>{n}, std::array<int64_t, 1>{1}, type);
}

// Eigenvectors are column-major, as LAPACK leaves them.
Tensor empty_columns(int64_t n, ScalarType type) {
  return empty_strided(std::array<int64_t, 2>{n, n}, std::array<int64_t, 2>{1, std::max<int64_t>(n, 1)}, type);
}

// torch's solver for one problem, through a plain view of the factor: worker threads have no grad mode of their caller.
bool solve(const Problem& p, ScalarType type, Solution& solution) noexcept {
  try {
    const bool upper = p.n >= kUpperOrder;
    const std::array<int64_t, 2> sizes{p.n, p.n};
    const std::array<int64_t, 2> strides{upper ? p.col_stride : p.row_stride, upper ? p.row_stride : p.col_stride};
    const Tensor view = torch::stable::from_blob(const_cast<void*>(p.data), sizes, strides,
                                                 torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
    return linalg_eigh(view, upper ? "U" : "L", solution.values, solution.vectors);
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
void diagonalize(const Problem& problem, ScalarType type, Solution& solution, int64_t threads,
                 const Workspace& workspace) {
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
  if (!solved && !solve(problem, type, solution)) {
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
    if (!linalg_eigh(torch::stable::transpose(storage, 1, 2), "L", values, vectors)) return false;
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

// Several matrices of one order, at most one for each lane, whose solutions are allocated; those that did not converge
// are left to LAPACK.
template <class T>
void diagonalize_lanes(const std::vector<Problem>& problems, const std::vector<int64_t>& members,
                       std::vector<Solution>& solutions, ScalarType type, std::byte* scratch) {
  std::array<kernels::BatchProblem<T>, kernels::kBatchLanes> lanes;
  std::array<size_t, kernels::kBatchLanes> numbers{};
  int64_t count = 0, n = 0;
  for (const int64_t member : members) {
    const size_t at = static_cast<size_t>(member);
    const Problem& p = problems[at];
    const T* f = static_cast<const T*>(p.data);
    n = p.n;
    solutions[at].info = lower_is_finite(f, n, p.row_stride, p.col_stride) ? 0 : -1;
    if (solutions[at].info != 0) continue;
    numbers[static_cast<size_t>(count)] = at;
    lanes[static_cast<size_t>(count++)] = {f, p.row_stride, p.col_stride,
                                           static_cast<T*>(solutions[at].values.mutable_data_ptr()),
                                           static_cast<T*>(solutions[at].vectors.mutable_data_ptr())};
  }
  if (count == 0) return;
  const uint32_t failed = Kernels<T>().batch_eigh.solve(lanes.data(), count, n, scratch);
  for (int64_t lane = 0; lane < count; ++lane) {
    const size_t at = numbers[static_cast<size_t>(lane)];
    if ((failed >> lane & 1u) != 0) {
      diagonalize<T>(problems[at], type, solutions[at], 1, {});
      continue;
    }
    T* values = lanes[static_cast<size_t>(lane)].values;
    solutions[at].info = shift_values(values, n, problems[at].damping, values);
  }
}

// Matrices that one task solves, all of one order when there are several.
struct Task {
  std::vector<int64_t> members;
  bool in_lanes;
};

// As many matrices to a task as there are lanes, where a vector solver pays; of what is left, up to an even share of
// those of one order.
std::vector<Task> share_out(const std::vector<Problem>& problems, int64_t threads, int64_t lanes, int64_t largest) {
  constexpr int64_t kBatchesPerThread = 2;  // a second one to balance threads that are not equally fast
  std::map<int64_t, std::vector<int64_t>> by_order;
  std::vector<Task> result;
  for (size_t i = 0; i < problems.size(); ++i) {
    if (problems[i].n == 0) continue;
    if (problems[i].warm || problems[i].n > kBatchOrder) {
      result.push_back({{static_cast<int64_t>(i)}, false});
    } else {
      by_order[problems[i].n].push_back(static_cast<int64_t>(i));
    }
  }
  for (const auto& [n, members] : by_order) {
    auto next = members.begin();
    // A vector costs the same however few of its lanes are used, and at the largest order it takes all of them to pay.
    while (next != members.end()) {
      const int64_t count = std::min<int64_t>(lanes, members.end() - next);
      if (count * largest < n * lanes) break;
      result.push_back({{next, next + count}, true});
      next += count;
    }
    const int64_t count = members.end() - next, parts = std::min(count, threads == 1 ? 1 : threads * kBatchesPerThread);
    for (int64_t part = 0; part < parts; ++part) {
      result.push_back({{next + part * count / parts, next + (part + 1) * count / parts}, false});
    }
  }
  return result;
}

// Outputs of a matrix without a decomposition.
void fill_with_nan(Solution& solution, int64_t n, ScalarType type) {
  solution.values = empty_vector(n, type);
  solution.vectors = empty_columns(n, type);
  torch::stable::fill_(solution.values, std::numeric_limits<double>::quiet_NaN());
  torch::stable::fill_(solution.vectors, std::numeric_limits<double>::quiet_NaN());
}

using Result = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

Result damped_eigh(std::vector<Tensor> factors, Tensor damping, std::optional<std::vector<Tensor>> basis) {
  check_damped_eigh(factors, damping, basis);
  const ScalarType type = damping.scalar_type();
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
    problems.push_back({n, f.stride(0), f.stride(1), f.const_data_ptr(), shifts[i]});
    if (basis && n >= kRefineOrder) {
      problems.back().warm = true;
      problems.back().basis = matrix_of((*basis)[i]);
      largest_warm = std::max(largest_warm, n);
    }
    if (n <= kBatchOrder || problems.back().warm) solutions[i] = {empty_vector(n, type), empty_columns(n, type)};
  }
  const bool wide = type == ScalarType::Double;
  const kernels::BatchEighKernels<float>& narrow_lanes = Kernels<float>().batch_eigh;
  const kernels::BatchEighKernels<double>& wide_lanes = Kernels<double>().batch_eigh;
  const std::vector<Task> tasks = share_out(problems, threads, wide ? wide_lanes.lanes : narrow_lanes.lanes,
                                            wide ? wide_lanes.largest_order : narrow_lanes.largest_order);
  int64_t lanes_bytes = 0;
  for (const Task& task : tasks) {
    const int64_t n = problems[static_cast<size_t>(task.members[0])].n;
    costs.push_back(std::pow(static_cast<double>(n), 3) * static_cast<double>(task.members.size()));
    remaining += costs.back();
    if (task.in_lanes) {
      lanes_bytes =
          std::max(lanes_bytes, Scratch::rounded(wide ? wide_lanes.scratch_bytes(n) : narrow_lanes.scratch_bytes(n)));
    }
  }

  const int64_t refinement_bytes = wide ? EigenbasisRefinement<double>::workspace_bytes(largest_warm)
                                        : EigenbasisRefinement<float>::workspace_bytes(largest_warm);
  const int64_t gemm_bytes =
      wide ? ParallelGemm<double>::scratch_bytes(largest_warm) : ParallelGemm<float>::scratch_bytes(largest_warm);
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(tasks.size())));
  const Scratch refinement(refinement_bytes * workers), gemm(gemm_bytes * threads), lanes(lanes_bytes * workers);
  const auto run = [&](int64_t task, int64_t worker, int64_t inner_threads) {
    const std::vector<int64_t>& members = tasks[static_cast<size_t>(task)].members;
    if (tasks[static_cast<size_t>(task)].in_lanes) {
      std::byte* scratch = lanes.at<std::byte>(worker * lanes_bytes);
      if (wide) {
        diagonalize_lanes<double>(problems, members, solutions, type, scratch);
      } else {
        diagonalize_lanes<float>(problems, members, solutions, type, scratch);
      }
      return;
    }
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
        diagonalize<double>(problems[at], type, solutions[at], inner_threads, workspace);
      } else {
        diagonalize<float>(problems[at], type, solutions[at], inner_threads, workspace);
      }
    }
  };
  // A matrix with more than an even share of the work runs alone, with LAPACK's own threads; the rest side by side.
  std::vector<int64_t> order = largest_first(costs);
  size_t alone = 0;
  while (threads > 1 && alone < order.size() && tasks[static_cast<size_t>(order[alone])].members.size() == 1 &&
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
