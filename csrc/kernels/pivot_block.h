// The dense heart of a Cholesky inverse: a block of pivots, factorised and inverted in double. For kernels only.
#pragma once

#include <cstdint>

#include "kernels/damped_inverse.h"
#include "kernels/source.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {

inline constexpr int64_t kLeaf = kCholeskyLeaf;
// Rows of a leaf that are eliminated together, so that one load of an earlier row serves all of them.
inline constexpr int64_t kRows = 4;

// x - x is 0 for every finite x and NaN otherwise. As flags rather than a sum, whose additions would wait for one
// another.
template <class T>
static inline int not_finite(T x) {
  return !(x - x == T(0));
}

// The same for many vectors: lanes of the sum of such differences are 0 exactly when all were finite.
template <class T>
static inline bool all_zero(Vector<T> defect) {
  int bad = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) bad |= !(defect[i] == T(0));
  return bad == 0;
}

// Inside a leaf everything is double, whatever the matrix is: at a condition of 1e4 the rounding of the pivots is what
// a float32 inverse loses most of its digits to, and a leaf is a small part of the work.
using Real = double;

// target[first + r, from:to] -= sum over k < first of scale[k, first + r] * rows[k, from:to], r < kRows. All are
// (leaf, leaf) row-major; from and to are rounded outwards to whole vectors, which stay inside a row of leaf entries.
template <int64_t leaf>
static inline void eliminate(const Real* scale, const Real* rows, Real* target, int64_t first, int64_t from,
                             int64_t to) {
  constexpr int64_t lanes = kLanes<Real>;
  for (int64_t j = from / lanes * lanes; j < to; j += lanes) {
    Vector<Real> sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load(target + (first + r) * leaf + j);
    for (int64_t k = 0; k < first; ++k) {
      const Vector<Real> row = load(rows + k * leaf + j);
      for (int r = 0; r < kRows; ++r) sum[r] -= scale[k * leaf + first + r] * row;
    }
    for (int r = 0; r < kRows; ++r) store(target + (first + r) * leaf + j, sum[r]);
  }
}

static inline void axpy(Real* target, Real scale, const Real* row, int64_t from, int64_t to) {
  constexpr int64_t lanes = kLanes<Real>;
  for (int64_t j = from / lanes * lanes; j < to; j += lanes)
    store(target + j, load(target + j) - scale * load(row + j));
}

static inline void multiply(Real* target, Real scale, int64_t from, int64_t to) {
  constexpr int64_t lanes = kLanes<Real>;
  for (int64_t j = from / lanes * lanes; j < to; j += lanes) store(target + j, scale * load(target + j));
}

template <int64_t leaf>
static inline void clear(Real* rows, int64_t count) {
  for (int64_t at = 0; at < count * leaf; at += kLanes<Real>) store(rows + at, Vector<Real>{});
}

// w := L^-1 (lower triangle, zeros above) of the matrix whose lower triangle is in u (transposed: u[j, i] for i >= j).
// Both have leaf columns and `padded` rows, a multiple of kRows. Returns 0 or the order of the first bad leading
// minor.
template <int64_t leaf>
static int32_t invert_root(Real* u, Real* w, int64_t padded) {
  alignas(64) Real inverse_pivot[leaf];
  for (int64_t first = 0; first < padded; first += kRows) {
    eliminate<leaf>(u, u, u, first, first, padded);
    for (int64_t i = first; i < first + kRows; ++i) {
      Real* row = u + i * leaf;
      for (int64_t k = first; k < i; ++k) axpy(row, u[k * leaf + i], u + k * leaf, i, padded);
      const Real pivot = row[i];
      if (!(pivot > 0) || !(pivot - pivot == 0)) return static_cast<int32_t>(i + 1);
      inverse_pivot[i] = 1 / __builtin_sqrt(pivot);
      multiply(row, inverse_pivot[i], i, padded);
    }
  }
  // Row i of L^-1 is (e_i - sum_{k<i} L[i, k] (row k of L^-1)) / L[i, i], and L[i, k] = u[k, i].
  clear<leaf>(w, padded);
  for (int64_t i = 0; i < padded; ++i) w[i * leaf + i] = 1;
  for (int64_t first = 0; first < padded; first += kRows) {
    eliminate<leaf>(u, w, w, first, 0, first);
    for (int64_t i = first; i < first + kRows; ++i) {
      Real* row = w + i * leaf;
      for (int64_t k = first; k < i; ++k) axpy(row, u[k * leaf + i], w + k * leaf, 0, k + 1);
      multiply(row, inverse_pivot[i], 0, i + 1);
    }
  }
  return 0;
}

// Rows of u past the matrix are those of the identity, so that groups of kRows rows need no remainder.
template <int64_t leaf>
static inline int64_t pad(Real* u, int64_t n) {
  const int64_t padded = (n + kRows - 1) / kRows * kRows;
  clear<leaf>(u, padded);
  for (int64_t i = n; i < padded; ++i) u[i * leaf + i] = 1;
  return padded;
}

}  // namespace kronfac::kernels::KRONFAC_ISA
