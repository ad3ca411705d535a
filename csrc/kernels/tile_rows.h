// The register tile of tile.h over operands that were not packed: k runs along the rows of both, wherever these lie.
// For kernels only.
#pragma once

#include <cstdint>

#include "kernels/source.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {

// Rows of a matrix whose columns are contiguous.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Product of R columns of one operand, transposed, with `vectors` vectors of columns of another, over kc rows. fetch(k)
// may prefetch for row k; write(i, j, v) is as in tile.h.
template <class T, int R, int vectors, class Fetch, class Write>
static inline __attribute__((always_inline)) void tile_of_rows(int64_t kc, const Rows<T>& left, const Rows<T>& right,
                                                               Fetch fetch, Write write) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> sum[R][vectors] = {};
  const T *a = left.data, *b = right.data;
#pragma GCC unroll 2
  for (int64_t k = 0; k < kc; ++k) {
    Vector<T> row[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) row[j] = load(b + j * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vector<T> factor = a[i] - Vector<T>{};
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += factor * row[j];
    }
    fetch(k);
    a += left.stride;
    b += right.stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) write(i, j * lanes, sum[i][j]);
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA
