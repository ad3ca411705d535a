// Packing for the general product: panels `width` wide, transposed in registers where the source runs along the sum.
// For kernels only.
#pragma once

#include <cstdint>

#include "kernels/source.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {

// Vectors transposed as a square matrix: log2(lanes) rounds of interleaving the upper with the lower half.
template <class T>
static inline __attribute__((always_inline)) void transpose(Vector<T>* v) {
  constexpr int lanes = static_cast<int>(kLanes<T>);
#pragma GCC unroll 8
  for (int round = 1; round < lanes; round *= 2) {
    Vector<T> w[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) interleave(v[i], v[i + lanes / 2], w[2 * i], w[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
}

// panels[k * width + j] := source[k * k_stride + j * j_stride] for one panel; zeros for nj <= j < width.
template <class T, int64_t width, class S>
static void pack_panel(const S* source, int64_t k_stride, int64_t j_stride, int64_t nk, int64_t nj, T* panel) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr bool same = __is_same(S, T);
  if (j_stride == 1 && nj == width) {
    for (int64_t k = 0; k < nk; ++k) {
      const S* row = source + k * k_stride;
      for (int64_t j = 0; j < width; ++j) panel[k * width + j] = convert<T>(row[j]);
    }
    return;
  }
  if constexpr (same && width % lanes == 0) {
    if (k_stride == 1) {
      for (int64_t j = 0; j < width; j += lanes) {
        const int64_t columns = smaller(lanes, nj - j);
        if (columns <= 0) {
          for (int64_t k = 0; k < nk; ++k) store(panel + k * width + j, Vector<T>{});
          continue;
        }
        const T* from = source + j * j_stride;
        for (int64_t k = 0; k < nk; k += lanes) {
          const int64_t run = smaller(lanes, nk - k);
          Vector<T> v[lanes];
          if (columns == lanes && run == lanes) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) v[i] = load(from + i * j_stride + k);
            transpose<T>(v);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) store(panel + (k + i) * width + j, v[i]);
          } else {
            for (int i = 0; i < lanes; ++i) v[i] = i < columns ? load_first(from + i * j_stride + k, run) : Vector<T>{};
            transpose<T>(v);
            for (int64_t i = 0; i < run; ++i) store(panel + (k + i) * width + j, v[i]);
          }
        }
      }
      return;
    }
  }
  for (int64_t k0 = 0; k0 < nk; k0 += 16) {  // runs that keep the written lines in L1
    const int64_t run = smaller(16, nk - k0);
    T* out = panel + k0 * width;
    for (int64_t j = 0; j < nj; ++j) {
      const S* column = source + j * j_stride + k0 * k_stride;
      for (int64_t k = 0; k < run; ++k) out[k * width + j] = convert<T>(column[k * k_stride]);
    }
    for (int64_t k = 0; k < run; ++k) {
      for (int64_t j = nj; j < width; ++j) out[k * width + j] = T(0);
    }
  }
}

// Panels [columns / width][nk][width] of the entries k0 <= k < k0 + nk, j0 <= j < j0 + nj of a matrix with k along
// rows.
template <class T, int64_t width>
static void pack_panels(const Matrix& matrix, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels) {
  visit(matrix.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    const S* source = static_cast<const S*>(matrix.data) + k0 * matrix.row_stride + j0 * matrix.col_stride;
    for (int64_t j = 0; j < nj; j += width) {
      pack_panel<T, width>(source + j * matrix.col_stride, matrix.row_stride, matrix.col_stride, nk,
                           smaller(width, nj - j), panels + j * nk);
    }
  });
}

}  // namespace kronfac::kernels::KRONFAC_ISA
