// Eigendecompositions of several small symmetric matrices of one order, one in each lane of a vector: reduction to
// tridiagonal form by Householder reflections, then implicit QL steps with Wilkinson's shift (Bowdler, Martin, Reinsch
// and Wilkinson, Numer. Math. 11, 1968; LAPACK's sytd2, orgtr and steqr). Lanes share every instruction and nothing
// else: the result for a matrix depends neither on its lane nor on its company.
#pragma once

#include <cstdint>

namespace kronfac::kernels {

// Lanes at most.
inline constexpr int64_t kBatchLanes = 16;

template <class S>
struct BatchProblem {
  const S* f;  // finite; the lower triangle is read
  int64_t row_stride, col_stride;
  S* values;   // n, ascending
  S* vectors;  // n x n, eigenvectors as rows
};

template <class S>
struct BatchEighKernels {
  int64_t lanes;
  // Up to this order a full vector of matrices takes less time than LAPACK for each of them.
  int64_t largest_order;
  int64_t (*scratch_bytes)(int64_t n);
  // count <= lanes problems of order n >= 1. scratch: scratch_bytes(n), aligned to 64. Bit i of the result is set when
  // problem i did not converge; its outputs are then undefined.
  uint32_t (*solve)(const BatchProblem<S>* problems, int64_t count, int64_t n, void* scratch);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const BatchEighKernels<float> batch_eigh_f32;
extern const BatchEighKernels<double> batch_eigh_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
