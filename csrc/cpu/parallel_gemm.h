// The shared matrix product, cut along C among threads where that pays. Cutting never changes a bit of the result.
#pragma once

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/typed.h"

namespace kronfac::cpu {

template <class T>
class ParallelGemm {
 public:
  // scratch: `threads` times scratch_bytes, enough for the largest product.
  ParallelGemm(int64_t threads, std::byte* scratch, int64_t scratch_bytes)
      : threads_(threads), scratch_(scratch), scratch_bytes_(scratch_bytes) {}

  static int64_t scratch_bytes(int64_t n) { return Scratch::rounded(Kernels<T>().gemm_scratch(n, n, n)); }

  // C := beta * C + alpha * A B; with `lower`, of a square C the lower triangle only.
  void operator()(int64_t m, int64_t n, int64_t k, double alpha, const kernels::Matrix& a, const kernels::Matrix& b,
                  double beta, T* c, int64_t ldc, bool lower = false) const {
    const bool worthwhile = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) > kParallelWork;
    const bool by_rows = lower || m >= n;
    const bool split = kernels_.split_pays(m, n, k);
    ranges(by_rows ? m : n, by_rows ? kernels_.blocks.mr : kernels_.blocks.nr, lower, worthwhile,
           [&](int64_t lo, int64_t hi, int64_t part) {
             void* scratch = scratch_ + part * scratch_bytes_;
             if (by_rows) {
               kernels_.gemm(hi - lo, n, k, alpha, shift(a, lo, 0), b, beta, c + lo * ldc, ldc, {lower, lo, 0}, split,
                             scratch);
             } else {
               kernels_.gemm(m, hi - lo, k, alpha, a, shift(b, 0, lo), beta, c + lo, ldc, {}, split, scratch);
             }
           });
  }

  // f(lo, hi, part) for ranges that cover [0, n), one for each thread: of equal length, or of equal area of a lower
  // triangle.
  template <class F>
  void ranges(int64_t n, int64_t multiple, bool triangular, bool worthwhile, const F& f) const {
    if (threads_ == 1 || !worthwhile) return f(int64_t{0}, n, int64_t{0});
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t lo = boundary(n, part, multiple, triangular), hi = boundary(n, part + 1, multiple, triangular);
        if (lo < hi) f(lo, hi, part);
      }
    });
  }

  // The part of a matrix of type T from entry (i, j) on.
  static kernels::Matrix shift(const kernels::Matrix& m, int64_t i, int64_t j) {
    return {static_cast<const T*>(m.data) + i * m.row_stride + j * m.col_stride, m.type, m.row_stride, m.col_stride};
  }

  const Kernels<T>& kernels() const { return kernels_; }

 private:
  // Below this many multiply-adds a product is not worth waking threads for.
  static constexpr double kParallelWork = 2e6;

  int64_t boundary(int64_t n, int64_t part, int64_t multiple, bool triangular) const {
    if (part >= threads_) return n;
    const double share = static_cast<double>(part) / static_cast<double>(threads_);
    const double at = static_cast<double>(n) * (triangular ? std::sqrt(share) : share);
    return std::min(n, static_cast<int64_t>(at / static_cast<double>(multiple) + 0.5) * multiple);
  }

  Kernels<T> kernels_;
  int64_t threads_;
  std::byte* scratch_;
  int64_t scratch_bytes_;
};

}  // namespace kronfac::cpu
