// (F_i + damping_i I)^-1 for a ragged list of symmetric matrices, each in one sweep over blocks of pivots.
#include <limits>
#include <tuple>

#include "common/arguments.h"
#include "cpu/inverse_sweep.h"
#include "cpu/typed.h"

namespace kronfac::cpu {
namespace {

constexpr const char* kOp = "damped_inverse";
constexpr int64_t kLeaf = kernels::kCholeskyLeaf;
// A matrix of lower order is not shared among threads: its updates are too small to cut.
constexpr int64_t kSharedOrder = 192;
// Up to this order a float32 matrix is inverted in double, which costs little there (most of the time is spent on
// pivots) and leaves only the rounding of input and output.
constexpr int64_t kDoubleOrder = 128;

// One factor as plain numbers: nothing below may throw, so nothing below asks a tensor.
template <class T>
struct Problem {
  const T* f;
  int64_t n, row_stride, col_stride;
  double damping;
  T* x;
};

// From this order on a matrix is several times as large as an L2 cache of 2 MiB, and the fewer blocks of pivots pass
// over it, the better.
constexpr int64_t kLargeOrder = 1536;

// The way to one inverse: how much memory of its own it needs, or the result.
template <class T>
class Method {
 public:
  int64_t bytes(int64_t n) const {
    if (n <= kLeaf) return 0;
    if (wide(n)) return wide_.bytes(n);
    return n < kLargeOrder ? sweep_.bytes(n) : large_.bytes(n);
  }

  // Returns info; where it is not 0, x is NaN.
  int32_t run(const Problem<T>& p, int64_t threads, std::byte* memory) const {
    const int32_t info = invert(p, threads, memory);
    if (info != 0) std::fill(p.x, p.x + p.n * p.n, std::numeric_limits<T>::quiet_NaN());
    return info;
  }

 private:
  static bool wide(int64_t n) { return sizeof(T) == sizeof(float) && n <= kDoubleOrder; }

  int32_t invert(const Problem<T>& p, int64_t threads, std::byte* memory) const {
    if (p.n <= kLeaf) return kernels_.damped_inverse.small(p.f, p.row_stride, p.col_stride, p.n, p.damping, p.x);
    if (wide(p.n)) return wide_.run(p.f, p.row_stride, p.col_stride, p.n, p.damping, p.x, 1, memory);
    const InverseSweep<T, T>& sweep = p.n < kLargeOrder ? sweep_ : large_;
    return sweep.run(p.f, p.row_stride, p.col_stride, p.n, p.damping, p.x, threads, memory);
  }

  Kernels<T> kernels_;
  InverseSweep<T, T> sweep_{*kernels_.damped_inverse.sweep, *kernels_.damped_inverse.sweep_copies};
  InverseSweep<T, T> large_{*kernels_.damped_inverse.large_sweep, *kernels_.damped_inverse.sweep_copies};
  InverseSweep<T, double> wide_{*kernels_.table.damped_inverse_f64->sweep, *kernels_.damped_inverse.wide_sweep_copies};
};

template <class T>
void invert_all(const std::vector<Tensor>& factors, const std::vector<double>& damping,
                const std::vector<Tensor>& inverses, int32_t* info) {
  std::vector<Problem<T>> problems;
  std::vector<double> costs;
  double remaining = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor& f = factors[i];
    const int64_t n = f.size(0);
    problems.push_back(
        {f.const_data_ptr<T>(), n, f.stride(0), f.stride(1), damping[i], inverses[i].mutable_data_ptr<T>()});
    costs.push_back(static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n));
    remaining += costs.back();
  }
  // A matrix with more than an even share of the remaining work is given to all threads; the rest go to one thread
  // each.
  const int64_t threads = thread_count();
  std::vector<int64_t> order = largest_first(costs);
  size_t shared = 0;
  while (threads > 1 && shared < order.size() && problems[static_cast<size_t>(order[shared])].n > kSharedOrder &&
         costs[static_cast<size_t>(order[shared])] * static_cast<double>(threads) > remaining) {
    remaining -= costs[static_cast<size_t>(order[shared++])];
  }

  const Method<T> method;
  int64_t bytes = 0;
  for (const Problem<T>& p : problems) bytes = std::max(bytes, method.bytes(p.n));
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(order.size() - shared)));
  const Scratch memory(bytes * workers);
  // Updates go across the rows of a workspace, each of which is more than a small page.
  prefer_large_pages(memory.template at<std::byte>(), bytes * workers);

  const auto run = [&](int64_t i, int64_t worker, int64_t inner_threads) {
    const size_t at = static_cast<size_t>(i);
    info[at] = method.run(problems[at], inner_threads, memory.template at<std::byte>(worker * bytes));
  };
  for (size_t s = 0; s < shared; ++s) run(order[s], 0, threads);
  order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shared));
  run_tasks(order, workers, [&](int64_t i, int64_t worker) { run(i, worker, 1); });
}

std::tuple<std::vector<Tensor>, Tensor> damped_inverse(std::vector<Tensor> factors, Tensor damping) {
  check_damped_inverse(factors, damping);
  const std::vector<double> values = read_damping(kOp, damping, factors.size());

  std::vector<Tensor> inverses;
  for (const Tensor& factor : factors) {
    inverses.push_back(empty_matrix(factor.size(0), factor.size(0), damping.scalar_type()));
  }
  const Tensor info = empty_vector(static_cast<int64_t>(factors.size()), ScalarType::Int);
  if (!factors.empty()) {
    int32_t* codes = info.mutable_data_ptr<int32_t>();
    if (damping.scalar_type() == ScalarType::Double) {
      invert_all<double>(factors, values, inverses, codes);
    } else {
      invert_all<float>(factors, values, inverses, codes);
    }
  }
  return {inverses, info};
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "damped_inverse", TORCH_BOX(&kronfac::cpu::damped_inverse));
}
