// w := w - V^T (V w), several times, on the GPU: classical Gram-Schmidt against stored rows.
//
// A sweep subtracts the coefficients of the last one from w and projects the result at once, a block of columns at a
// time: the block is still in a cache when it is read again, so that a sweep reads V from memory once. There are
// passes + 1 sweeps; the first does not subtract, the last does not project.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

// Strides in elements; w (n), v (m, n), all of type f32 or f64.
struct Orthogonalize {
  Element type;
  void* w;
  const void* v;
  int64_t w_stride, row_stride, column_stride;
  int64_t m, n, passes;
  void* coefficients;  // (m), of w's type: their sums over all passes
  double* partial;     // (m, blocks): projections of each block of columns
  double* latest;      // (m): coefficients of the latest projection
  double* total;       // (m)
  int64_t width, blocks;
};

inline constexpr int kOrthogonalizeThreads = 256, kOrthogonalizeWidest = 1024;

// Columns of a block: its entries of V take 128 KiB at most where that leaves every thread a column. As many blocks as
// run at a time then fit into an L2 cache of 40 MB.
inline int64_t orthogonalize_width(int64_t m, int64_t element_bytes) {
  constexpr int64_t kBytes = int64_t{1} << 17;
  const int64_t fitting = kBytes / std::max<int64_t>(1, m * element_bytes);
  return std::clamp<int64_t>(fitting / kOrthogonalizeThreads * kOrthogonalizeThreads, kOrthogonalizeThreads,
                             kOrthogonalizeWidest);
}

void orthogonalize(const Orthogonalize& p, Stream stream);

}  // namespace kronfac::cuda
