// Gram-Schmidt projection of a long vector against stored rows, one block of columns at a time: the block is small
// enough to stay in the cache between the two kernels, so that a pass reads every stored row from memory once.
#pragma once

#include <cstdint>

namespace kronfac::kernels {

template <class T>
struct OrthogonalizeKernels {
  // c[i] += sum_j v[i * stride + j] w[j], i < m, j < n: sums over j in T (n is one block), c in double.
  void (*project)(const T* v, int64_t stride, int64_t m, int64_t n, const T* w, double* c);
  // w[j] -= sum_i c[i] v[i * stride + j], i < m, j < n.
  void (*subtract)(const T* v, int64_t stride, int64_t m, int64_t n, const T* c, T* w);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const OrthogonalizeKernels<float> orthogonalize_f32;
extern const OrthogonalizeKernels<double> orthogonalize_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
