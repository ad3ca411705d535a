// Sums over examples of the elementwise square of a product: S = sum_n (g_n^T [x_n 1])^2, g_n (T, outputs), x_n (T,
// inputs).
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace kronfac::kernels {

// Strides in elements; example n starts at data + n * example_stride.
struct Examples {
  Matrix matrix;  // of example 0: (T, features)
  int64_t features;
  int64_t example_stride;
};

template <class T>
struct SecondMomentKernels {
  // Bytes of scratch for a block of these sizes.
  int64_t (*scratch)(int64_t rows, int64_t columns, int64_t positions);
  // out := decay * out + scale * S for the block of rows [row0, row1) and columns [col0, col1) of S; column `features`
  // of x, if asked for, stands for the ones. out points at entry (0, 0) of the whole. decay == 0 does not read out.
  void (*block)(const Examples& g, const Examples& x, int64_t examples, int64_t positions, int64_t row0, int64_t row1,
                int64_t col0, int64_t col1, T decay, T scale, T* out, int64_t row_stride, int64_t col_stride,
                void* scratch);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const SecondMomentKernels<float> second_moment_f32;
extern const SecondMomentKernels<double> second_moment_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
