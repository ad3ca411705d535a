// Turning approximate eigenvectors into eigenvectors by matrix products alone (Ogita and Aishima, Japan J. Indust.
// Appl. Math. 35, 2018). With R = I - Q^T Q, S = Q^T A Q and l_i = S_ii / (1 - R_ii), the correction Q := Q + Q E has
//   E_ij = (S_ij + l_j R_ij) / (l_j - l_i),  E_ii = R_ii / 2,
// and converges quadratically from a basis close enough. Where the numerator is rounding already, E_ij = R_ij / 2
// restores the orthogonality and leaves the pair unrotated: inside a cluster of equal eigenvalues any orthonormal basis
// will do.
//
// Nothing is returned that does not pass the test that a full solver would: columns of the residual and inner products
// of the basis of the size of its rounding errors. Everything else is refused, most of it before any n^3 work.
#pragma once

#include <limits>
#include <numeric>

#include "cpu/parallel_gemm.h"

namespace kronfac::cpu {

template <class T>
class EigenbasisRefinement {
 public:
  // workspace: workspace_bytes(n).
  EigenbasisRefinement(const ParallelGemm<T>& gemm, int64_t n, std::byte* workspace)
      : gemm_(gemm),
        n_(n),
        a_(reinterpret_cast<T*>(workspace)),
        y_(a_ + n * n),
        s_(y_ + n * n),
        r_(s_ + n * n),
        values_(reinterpret_cast<double*>(workspace + matrix_bytes(n))),
        residual_(values_ + n),
        order_(reinterpret_cast<int64_t*>(residual_ + n)) {}

  static int64_t workspace_bytes(int64_t n) {
    return matrix_bytes(n) + Scratch::rounded(n * static_cast<int64_t>(2 * sizeof(double) + sizeof(int64_t)));
  }

  // Eigenvalues (ascending) and eigenvectors (as rows of `rows`, n x n) of the symmetric f, of which the lower triangle
  // is read, from the columns of `basis`. False when f is not finite or the basis is not close enough; the outputs are
  // then undefined.
  bool run(const T* f, int64_t row_stride, int64_t col_stride, const kernels::Matrix& basis, T* values, T* rows) {
    if (!symmetrise(f, row_stride, col_stride) || !promising(basis)) return false;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < n_; ++j) {
        rows[i * n_ + j] = static_cast<const T*>(basis.data)[j * basis.row_stride + i * basis.col_stride];
      }
    }
    // A second correction would cost more than solving anew.
    if (!measure(rows) && !(correct(rows) && measure(rows))) return false;
    sort(values, rows);
    return true;
  }

 private:
  static constexpr int64_t kProbes = 8;
  static constexpr double kEpsilon = static_cast<double>(std::numeric_limits<T>::epsilon());

  // What LAPACK leaves, relative to |A|: of a residual's column, of an inner product.
  double tolerance() const { return 2 * kEpsilon * std::sqrt(static_cast<double>(n_)); }
  // A correction leaves errors of the size of its square.
  double largest_rotation() const { return std::sqrt(tolerance()); }
  static int64_t matrix_bytes(int64_t n) { return Scratch::rounded(4 * n * n * static_cast<int64_t>(sizeof(T))); }
  kernels::Matrix view(const T* data) const { return {data, Kernels<T>::element, n_, 1}; }

  bool symmetrise(const T* f, int64_t row_stride, int64_t col_stride) {
    std::atomic<bool> finite{true};
    gemm_.ranges(n_, 1, true, true, [&](int64_t lo, int64_t hi, int64_t) {
      if (!gemm_.kernels().damped_inverse.copy_in(f, row_stride, col_stride, n_, lo, hi, a_)) finite = false;
    });
    if (!finite) return false;
    gemm_.ranges(n_, 1, true, true,
                 [&](int64_t lo, int64_t hi, int64_t) { gemm_.kernels().damped_inverse.mirror(a_, n_, lo, hi); });
    return true;
  }

  // Looks at a few columns, the last one (the largest eigenvalue) among them: a change that one of them shows to be too
  // large for convergence is refused for the price of n^2 operations each.
  bool promising(const kernels::Matrix& basis) {
    const int64_t probes = std::min(kProbes, n_), step = std::max<int64_t>(1, n_ / probes),
                  first = n_ - 1 - (probes - 1) * step;
    const kernels::Matrix some{static_cast<const T*>(basis.data) + first * basis.col_stride, basis.type,
                               basis.row_stride, step * basis.col_stride};
    gemm_(n_, probes, n_, 1, view(a_), some, 0, y_, probes);
    double largest_value = 0, largest_residual = 0;
    for (int64_t p = 0; p < probes; ++p) {
      const T* column = static_cast<const T*>(some.data) + p * some.col_stride;
      double quotient = 0, norm = 0, residual = 0;
      for (int64_t i = 0; i < n_; ++i) {
        const double q = column[i * some.row_stride];
        quotient += q * y_[i * probes + p];
        norm += q * q;
      }
      for (int64_t i = 0; i < n_; ++i) {
        const double d = y_[i * probes + p] - quotient * column[i * some.row_stride];
        residual += d * d;
      }
      if (!(std::abs(norm - 1) <= 0.1)) return false;  // also NaN
      largest_value = std::max(largest_value, std::abs(quotient));
      largest_residual = std::max(largest_residual, std::sqrt(residual));
    }
    // Neighbouring eigenvalues are about |A| / n apart and a residual spreads over sqrt(n) entries at least.
    // The tenth part, because the closest pairs of eigenvalues are much closer, and trying in vain costs half a
    // solution.
    return largest_residual * std::sqrt(static_cast<double>(n_)) <= 0.1 * largest_rotation() * largest_value;
  }

  // S and R (lower triangles) and the eigenvalue estimates; true when the rows of q are eigenvectors to working
  // precision.
  bool measure(const T* q) {
    const kernels::Matrix rows = view(q);
    gemm_(n_, n_, n_, 1, rows, view(a_), 0, y_, n_);
    gemm_(n_, n_, n_, 1, view(y_), rows.transposed(), 0, s_, n_, true);
    gemm_(n_, n_, n_, -1, rows, rows.transposed(), 0, r_, n_, true);
    norm_ = 0;
    for (int64_t i = 0; i < n_; ++i) {
      r_[i * n_ + i] += T(1);
      values_[i] = static_cast<double>(s_[i * n_ + i]) / (1 - static_cast<double>(r_[i * n_ + i]));
      norm_ = std::max(norm_, std::abs(values_[i]));
    }
    std::fill(residual_, residual_ + n_, 0.0);
    double skew = 0;
    for (int64_t i = 0; i < n_; ++i) {
      double row_sum = 0;
      for (int64_t j = 0; j < i; ++j) {
        const double s = s_[i * n_ + j], r = r_[i * n_ + j];
        const double ij = s + values_[j] * r, ji = s + values_[i] * r;
        residual_[j] += ij * ij;
        row_sum += ji * ji;
        skew = std::max(skew, std::abs(r));
      }
      residual_[i] += row_sum;
      skew = std::max(skew, std::abs(static_cast<double>(r_[i * n_ + i])));
    }
    const double worst = std::sqrt(*std::max_element(residual_, residual_ + n_));
    return worst <= tolerance() * norm_ && skew <= tolerance();
  }

  // One correction of the rows of q; false when it is too large to be trusted.
  bool correct(T* q) {
    // Below this an off-diagonal entry is no larger than the rounding of S itself.
    const double noise = kEpsilon * norm_;
    double largest = 0;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const double s = s_[i * n_ + j], r = r_[i * n_ + j], gap = values_[j] - values_[i];
        double ij = r / 2, ji = r / 2;
        if (std::abs(s + values_[j] * r) > noise || std::abs(s + values_[i] * r) > noise) {
          ij = (s + values_[j] * r) / gap;
          ji = -(s + values_[i] * r) / gap;
        }
        largest = std::max({largest, std::abs(ij), std::abs(ji)});
        // y := E^T, since the rows of q are the columns of Q.
        y_[j * n_ + i] = static_cast<T>(ij);
        y_[i * n_ + j] = static_cast<T>(ji);
      }
      y_[i * n_ + i] = r_[i * n_ + i] / 2;
    }
    if (!(largest <= largest_rotation())) return false;  // also an infinite or undefined quotient
    std::copy(q, q + n_ * n_, s_);
    gemm_(n_, n_, n_, 1, view(y_), view(s_), 1, q, n_);
    return true;
  }

  void sort(T* values, T* rows) {
    std::iota(order_, order_ + n_, 0);
    std::sort(order_, order_ + n_,
              [&](int64_t a, int64_t b) { return values_[a] < values_[b] || (values_[a] == values_[b] && a < b); });
    std::copy(rows, rows + n_ * n_, y_);
    for (int64_t i = 0; i < n_; ++i) {
      const T* row = y_ + order_[i] * n_;
      values[i] = static_cast<T>(values_[order_[i]]);
      std::copy(row, row + n_, rows + i * n_);
    }
  }

  const ParallelGemm<T>& gemm_;
  int64_t n_;
  // A, then products, S and R (n x n each); eigenvalue estimates, residuals of the columns, an order (n each).
  T *a_, *y_, *s_, *r_;
  double *values_, *residual_;
  int64_t* order_;
  double norm_ = 0;
};

}  // namespace kronfac::cpu
