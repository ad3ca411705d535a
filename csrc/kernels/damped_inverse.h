// The damped Cholesky inverse of small matrices, and copies of symmetric ones; larger ones: inverse_sweep.h.
#pragma once

#include <cstdint>

#include "kernels/inverse_sweep.h"

namespace kronfac::kernels {

// Order of the largest block that is factorised at once: 64 x 64 doubles and their inverse (64 KiB) are close to L1.
inline constexpr int64_t kCholeskyLeaf = 64;

template <class T>
struct DampedInverseKernels {
  // Lower triangle of x (n, n, contiguous) := that of the symmetric f; strict upper triangle := 0. Rows row0 <= i <
  // row1. False when an entry that was read is not finite (f's strict upper triangle is never read).
  bool (*copy_in)(const T* f, int64_t row_stride, int64_t col_stride, int64_t n, int64_t row0, int64_t row1, T* x);
  // The whole operation for n <= kCholeskyLeaf: x (n, n, contiguous) := (f + damping I)^-1, both triangles. Returns 0,
  // the order of the first bad leading minor, or -1 when f or the inverse is not finite; x is then undefined.
  int32_t (*small)(const T* f, int64_t row_stride, int64_t col_stride, int64_t n, double damping, T* x);
  // Strict upper triangle of x (n, n, contiguous) := its lower triangle, for columns of the upper part row0 <= i < row1
  // (that is: the rows that are read). False when an entry of these rows is not finite.
  bool (*mirror)(T* x, int64_t n, int64_t row0, int64_t row1);
  // For larger orders, in T and, for matrices of type T, in double.
  const SweepKernels<T>* sweep;
  const SweepKernels<T>* large_sweep;  // the same with more pivots to a block
  const SweepCopies<T, T>* sweep_copies;
  const SweepCopies<T, double>* wide_sweep_copies;
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const DampedInverseKernels<float> damped_inverse_f32;
extern const DampedInverseKernels<double> damped_inverse_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
