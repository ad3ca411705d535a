// Symmetric rank-k sums S = Y^T Y, of which only the lower triangle is formed: the shared half of the covariance
// operators. What Y is (a matrix, the patches of a map) is a packing function's business; see covariance.h and
// conv_covariance.h.
//
// An update forms rows [row0, row1) of the triangle over k in [k0, k1) into `sum`: entry (i, j), j <= i, at
// sum + (i - row0) * ld + j. row0 is a multiple of Blocks::nr, ld one of Blocks::nr and >= row1, and sum has row1 -
// row0 rounded up to Blocks::mr rows; entries right of the diagonal and past the edges hold anything afterwards. What
// sum held before is not read.
#pragma once

#include <cstdint>

namespace kronfac::kernels {

template <class T>
struct SymmetricKernels {
  // Bytes of scratch that an update of these rows over nk needs.
  int64_t (*scratch)(int64_t nk, int64_t row0, int64_t row1);

  // out (d, d) := decay * out + scale * S for the rows [row0, row1) of the lower triangle and their mirror images,
  // where S is the sum of `count` partial sums, `distance` elements apart, added in order. decay == 0 does not read
  // out.
  void (*finish)(int64_t row0, int64_t row1, T* sums, int64_t count, int64_t distance, int64_t ld, T decay, T scale,
                 T* out, int64_t row_stride, int64_t col_stride);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const SymmetricKernels<float> symmetric_f32;
extern const SymmetricKernels<double> symmetric_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
