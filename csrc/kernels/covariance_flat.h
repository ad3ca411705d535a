// The covariance of matrices of few rows: its d x d entries are written more often than they are added to, so a block
// of sums goes from registers through L1 straight into the result and its mirror image.
#pragma once

#include <cstdint>

#include "kernels/covariance.h"

namespace kronfac::kernels {

template <class T>
struct CovarianceFlat {
  // Rows at most, at least one; fewer of bfloat16 where matrix units take these.
  int64_t most_rows, most_bfloat_rows;
  // Elements of packed panels for nk rows and d columns, the ones included.
  int64_t (*packed)(int64_t nk, int64_t d);
  // Packs the columns [col0, col1) of [x 1]; col0 is a multiple of Blocks::nr.
  void (*pack)(const CovarianceInput& input, int64_t nk, int64_t d, int64_t col0, int64_t col1, T* panels);
  // out := decay * out + scale * [x 1]^T [x 1] for the rows [row0, row1) of the lower triangle and their mirror images,
  // from packed panels. row0 is a multiple of Blocks::nr. decay == 0 does not read out.
  void (*rows)(const T* panels, int64_t nk, int64_t d, int64_t row0, int64_t row1, T decay, T scale, T* out,
               int64_t row_stride, int64_t col_stride);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const CovarianceFlat<float> covariance_flat_f32;
extern const CovarianceFlat<double> covariance_flat_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
