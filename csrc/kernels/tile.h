// The register tile that every packed product is made of. For kernels only.
#pragma once

#include <cstdint>

#include "kernels/source.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {

// Vectors across a whole panel.
template <class T>
inline constexpr int kPanelVectors = blocks_of<T>().nr / static_cast<int>(kLanes<T>);

// Product of MR consecutive columns of one panel, transposed, with the first `vectors` vectors of another: sum over k
// of a[k][0..MR)^T b[k][0..vectors * lanes). `a` points at the first of its columns inside its panel; both panels are
// kc long.
template <class T, int vectors = kPanelVectors<T>>
struct Tile {
  static constexpr Blocks block = blocks_of<T>();
  static constexpr int rows = block.mr, width = block.nr;

  // write(i, j, v): lanes [j, j + lanes) of row i of the product; called once for each vector, after the sum.
  template <class Write>
  static inline __attribute__((always_inline)) void run(int64_t kc, const T* __restrict a, const T* __restrict b,
                                                        Write write) {
    Vector<T> sum[rows][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] = Vector<T>{};
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < kc; ++k) {
      Vector<T> right[vectors];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) right[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vector<T> left = a[i] - Vector<T>{};
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
      }
      a += width;
      b += width;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) write(i, j * kLanes<T>, sum[i][j]);
    }
  }
};

// Where column j of a packed block starts: panel j / NR, lane j % NR.
template <class T>
static inline const T* packed_column(const T* panels, int64_t kc, int64_t j) {
  constexpr int64_t width = blocks_of<T>().nr;
  return panels + j / width * width * kc + j % width;
}

}  // namespace kronfac::kernels::KRONFAC_ISA
