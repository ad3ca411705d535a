// Rows of [x 1]^T [x 1] in the sense of symmetric.h: Y is a matrix with, perhaps, a column of ones.
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace kronfac::kernels {

struct CovarianceInput {
  Matrix x;          // (m, features)
  int64_t features;  // without the ones
};

// Rows [row0, row1) over the rows [k0, k1) of x; row1 is at most features + 1, and features + 1 stands for the ones.
template <class T>
using CovarianceUpdate = void (*)(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1,
                                  T* sum, int64_t ld, void* scratch);

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
void covariance_f32(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, float* sum,
                    int64_t ld, void* scratch);
void covariance_f64(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, double* sum,
                    int64_t ld, void* scratch);
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
