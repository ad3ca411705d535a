// The update of covariance.h for matrices of few columns, where packing costs more than it saves: rows are read where
// they lie, and all columns of a run of rows stay in L1 while every tile of the triangle is formed from them.
#pragma once

#include <cstdint>

#include "kernels/covariance.h"

namespace kronfac::kernels {

// Columns at most, the ones included. Wider rows are better packed: a tile would meet too few of them in L1.
inline constexpr int64_t kNarrowColumns = 64;

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
// For row1 <= kNarrowColumns; scratch as for any update.
void covariance_narrow_f32(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, float* sum,
                           int64_t ld, void* scratch);
void covariance_narrow_f64(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1,
                           double* sum, int64_t ld, void* scratch);
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
