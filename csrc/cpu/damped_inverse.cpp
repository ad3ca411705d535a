// (F_i + damping_i I)^-1 for a ragged list of symmetric matrices: in one sweep over blocks of pivots while the matrix
// stays in cache, otherwise by recursive Cholesky factorisation, inverse of the factor and product of the inverse with
// its transpose, about n^3 / 6 multiply-adds each, nearly all of them in gemm.
#include <cstring>
#include <limits>
#include <tuple>

#include "cpu/inverse_sweep.h"
#include "cpu/parallel_gemm.h"

namespace kronfac::cpu {
namespace {

using kernels::Matrix;

constexpr const char* kOp = "damped_inverse";
constexpr int64_t kLeaf = kernels::kCholeskyLeaf;
// Rows or columns of a triangular operand that are multiplied as a dense block: the zeros inside cost kChunk / n of the
// work. A register tile's columns: the product reads such narrow operands in place, so that nothing is packed twice.
constexpr int64_t kChunk = 48;
// A matrix of lower order is not shared among threads: its products are too small to cut.
constexpr int64_t kSharedOrder = 192;
// Sums are cut into runs of at most so many terms, each rounded from zero before it joins its entry: that halves the
// rounding error and costs a few percent. From kLargeOrder on the runs may be longer, since LAPACK's own error has
// grown by then.
constexpr int64_t kRun = 64, kLongRun = 192, kLargeOrder = 512;
// Up to this order a float32 matrix is inverted in double, which costs little there (most of the time is spent on
// pivots) and leaves only the rounding of input and output.
constexpr int64_t kDoubleOrder = 128;
// Up to this order a matrix is swept: every block of pivots reads and writes all of it.
constexpr int64_t kSweptOrder = 768;

template <class T>
class Inverter {
 public:
  Inverter(const ParallelGemm<T>& gemm, T* x, int64_t n, std::byte* temporary)
      : gemm_(gemm), x_(x), n_(n), temporary_(reinterpret_cast<T*>(temporary)) {}

  static int64_t temporary_bytes(int64_t n) {
    const int64_t half = n / 2 + kLeaf;
    return Scratch::rounded(std::max({half * half, n * kLeaf, half * kChunk}) * static_cast<int64_t>(sizeof(T)));
  }

  // Returns info; where it is not 0, x is undefined.
  int32_t run(const T* f, int64_t row_stride, int64_t col_stride, double damping) {
    if (!copy_in(f, row_stride, col_stride, static_cast<T>(damping))) return -1;
    if (const int32_t info = factorize(0, n_)) return info;
    invert_factor(0, n_);
    multiply_factor(0, n_);
    return mirror() ? 0 : -1;
  }

 private:
  T* block(int64_t i, int64_t j) const { return x_ + i * n_ + j; }
  Matrix view(int64_t i, int64_t j) const { return {block(i, j), Kernels<T>::element, n_, 1}; }
  Matrix temporary_view(int64_t columns) const { return {temporary_, Kernels<T>::element, columns, 1}; }

  // First part of a split: whole leaves, so that every product but the last is a multiple of the register tile.
  static int64_t split(int64_t n) { return (n / 2 + kLeaf - 1) / kLeaf * kLeaf; }

  void gemm(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, T* c,
            int64_t ldc, bool lower = false) const {
    gemm_(m, n, k, alpha, a, b, beta, c, ldc, lower, n_ <= kLargeOrder ? kRun : kLongRun);
  }

  void copy_to_temporary(int64_t i, int64_t j, int64_t rows, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(temporary_ + r * columns, block(i + r, j), static_cast<size_t>(columns) * sizeof(T));
    }
  }

  bool copy_in(const T* f, int64_t row_stride, int64_t col_stride, T damping) const {
    std::atomic<bool> finite{true};
    gemm_.ranges(n_, 1, true, n_ > 4 * kLeaf, [&](int64_t lo, int64_t hi, int64_t) {
      if (!gemm_.kernels().damped_inverse.copy_in(f, row_stride, col_stride, n_, damping, lo, hi, x_)) finite = false;
    });
    return finite;
  }

  bool mirror() const {
    std::atomic<bool> finite{true};
    gemm_.ranges(n_, 1, true, n_ > 4 * kLeaf, [&](int64_t lo, int64_t hi, int64_t) {
      if (!gemm_.kernels().damped_inverse.mirror(x_, n_, lo, hi)) finite = false;
    });
    return finite;
  }

  // Lower triangle of the block of order n at (o, o), A = L L^T: leaves on the diagonal become L_kk^-1, the rest L.
  int32_t factorize(int64_t o, int64_t n) {
    if (n == 0) return 0;
    if (n <= kLeaf) {
      const int32_t info = gemm_.kernels().damped_inverse.leaf(block(o, o), n_, n);
      return info == 0 ? 0 : static_cast<int32_t>(o) + info;
    }
    const int64_t n1 = split(n), n2 = n - n1;
    if (const int32_t info = factorize(o, n1)) return info;
    solve(o + n1, n2, o, n1);
    gemm(n2, n2, n1, -1, view(o + n1, o), view(o + n1, o).transposed(), 1, block(o + n1, o + n1), n_, true);
    return factorize(o + n1, n2);
  }

  // B := B L^-T for the rows i.. (m of them) and the columns o.. (n) of x, L the factorised block at (o, o).
  void solve(int64_t i, int64_t m, int64_t o, int64_t n) {
    if (n <= kLeaf) {
      copy_to_temporary(i, o, m, n);
      return gemm(m, n, n, 1, temporary_view(n), view(o, o).transposed(), 0, block(i, o), n_);
    }
    const int64_t n1 = split(n), n2 = n - n1;
    solve(i, m, o, n1);
    gemm(m, n2, n1, -1, view(i, o), view(o + n1, o).transposed(), 1, block(i, o + n1), n_);
    solve(i, m, o + n1, n2);
  }

  // L at (o, o) := W = L^-1: W21 = -W22 L21 W11.
  void invert_factor(int64_t o, int64_t n) {
    if (n <= kLeaf) return;
    const int64_t n1 = split(n), n2 = n - n1, p = o + n1;
    invert_factor(o, n1);
    invert_factor(p, n2);
    for (int64_t j = 0; j < n1; j += kChunk) {
      gemm(n2, std::min(kChunk, n1 - j), n1 - j, 1, view(p, o + j), view(o + j, o + j), 0, temporary_ + j, n1);
    }
    for (int64_t i = 0; i < n2; i += kChunk) {
      const int64_t end = std::min(i + kChunk, n2);
      gemm(end - i, n1, end, -1, view(p + i, p), temporary_view(n1), 0, block(p + i, o), n_);
    }
  }

  // W at (o, o) := lower triangle of W^T W: X11 = W11^T W11 + W21^T W21, X21 = W22^T W21, X22 = W22^T W22.
  void multiply_factor(int64_t o, int64_t n) {
    if (n <= kLeaf) {
      copy_to_temporary(o, o, n, n);
      return gemm(n, n, n, 1, temporary_view(n).transposed(), temporary_view(n), 0, block(o, o), n_, true);
    }
    const int64_t n1 = split(n), n2 = n - n1, p = o + n1;
    multiply_factor(o, n1);
    gemm(n1, n1, n2, 1, view(p, o).transposed(), view(p, o), 1, block(o, o), n_, true);
    // Downwards in place: rows i.. of the product need rows i.. of W21 only.
    for (int64_t i = 0; i < n2; i += kChunk) {
      const int64_t rows = std::min(kChunk, n2 - i), below = i + rows;
      copy_to_temporary(p + i, o, rows, n1);
      gemm(rows, n1, rows, 1, view(p + i, p + i).transposed(), temporary_view(n1), 0, block(p + i, o), n_);
      gemm(rows, n1, n2 - below, 1, view(p + below, p + i).transposed(), view(p + below, o), 1, block(p + i, o), n_);
    }
    multiply_factor(p, n2);
  }

  const ParallelGemm<T>& gemm_;
  T* x_;
  int64_t n_;
  T* temporary_;
};

// One factor as plain numbers: nothing below may throw, so nothing below asks a tensor.
template <class T>
struct Problem {
  const T* f;
  int64_t n, row_stride, col_stride;
  double damping;
  T* x;
};

// Memory of one worker (and, when a matrix is shared, of each thread's products).
struct Memory {
  std::byte *own, *gemm;
  int64_t gemm_bytes;
};

// The way to one inverse: how much memory of its own it needs, or the result.
template <class T>
class Method {
 public:
  int64_t own_bytes(int64_t n) const {
    if (n <= kLeaf) return 0;
    if (wide(n)) return wide_.bytes(n);
    if (n <= kSweptOrder) return sweep_.bytes(n);
    return Inverter<T>::temporary_bytes(n);
  }
  static int64_t gemm_bytes(int64_t n) { return n <= kSweptOrder ? 0 : ParallelGemm<T>::scratch_bytes(n); }

  // Returns info; where it is not 0, x is NaN.
  int32_t run(const Problem<T>& p, int64_t threads, const Memory& memory) const {
    const int32_t info = invert(p, threads, memory);
    if (info != 0) std::fill(p.x, p.x + p.n * p.n, std::numeric_limits<T>::quiet_NaN());
    return info;
  }

 private:
  static bool wide(int64_t n) { return sizeof(T) == sizeof(float) && n <= kDoubleOrder; }

  int32_t invert(const Problem<T>& p, int64_t threads, const Memory& memory) const {
    if (p.n <= kLeaf) return kernels_.damped_inverse.small(p.f, p.row_stride, p.col_stride, p.n, p.damping, p.x);
    if (wide(p.n)) return wide_.run(p.f, p.row_stride, p.col_stride, p.n, p.damping, p.x, 1, memory.own);
    if (p.n <= kSweptOrder)
      return sweep_.run(p.f, p.row_stride, p.col_stride, p.n, p.damping, p.x, threads, memory.own);
    const ParallelGemm<T> gemm(threads, memory.gemm, memory.gemm_bytes);
    return Inverter<T>(gemm, p.x, p.n, memory.own).run(p.f, p.row_stride, p.col_stride, p.damping);
  }

  Kernels<T> kernels_;
  InverseSweep<T, T> sweep_{*kernels_.damped_inverse.sweep, *kernels_.damped_inverse.sweep_copies};
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
  int64_t own_bytes = 0, gemm_bytes = 0;
  for (const Problem<T>& p : problems) {
    own_bytes = std::max(own_bytes, method.own_bytes(p.n));
    gemm_bytes = std::max(gemm_bytes, method.gemm_bytes(p.n));
  }
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(order.size() - shared)));
  const Scratch own(own_bytes * workers), gemm(gemm_bytes * threads);

  const auto run = [&](int64_t i, int64_t worker, int64_t inner_threads) {
    const size_t at = static_cast<size_t>(i);
    info[at] = method.run(
        problems[at], inner_threads,
        {own.template at<std::byte>(worker * own_bytes), gemm.template at<std::byte>(worker * gemm_bytes), gemm_bytes});
  };
  for (size_t s = 0; s < shared; ++s) run(order[s], 0, threads);
  order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shared));
  run_tasks(order, workers, [&](int64_t i, int64_t worker) { run(i, worker, 1); });
}

std::tuple<std::vector<Tensor>, Tensor> damped_inverse(std::vector<Tensor> factors, Tensor damping) {
  check_wide(kOp, "damping", damping);
  for (size_t i = 0; i < factors.size(); ++i) {
    check_square(kOp, item("factors", i), factors[i]);
    check_dtype(kOp, item("factors", i), factors[i], damping.scalar_type(), "the type of damping");
    check_device(kOp, item("factors", i), factors[i], damping, "damping");
  }
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
