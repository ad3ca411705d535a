// The inverse of a damped symmetric matrix in one sweep over blocks of pivots (one of the variants of Bientinesi,
// Gunter and van de Geijn, ACM TOMS 35(1), 2008). With N = -(F + damping I) and, for each block K in turn, the inverse
// W of the Cholesky factor of -N_KK:
//
//   Y := N_:K W^T,  Y_K := W^T,  N_:K := 0,  N_K: := 0,  N := N + Y Y^T  (lower triangle)
//
// and N ends as the inverse: rows not yet reached hold the (negative) Schur complement, rows passed the inverse of what
// lies above, and the rest their product. n^3 / 2 multiply-adds like factorising, inverting the factor and multiplying
// it, but nearly all of them in one kind of update, long enough for the register tiles whatever the order.
//
// N lives in a padded workspace: rows of whole cache lines, so that no tile has an edge in memory. These are its parts,
// which may be shared among threads by panels or rows; between `pivot`, `panels` and `update` of one block, and of two
// blocks, everything must be complete.
#pragma once

#include <cstdint>

namespace kronfac::kernels {

template <class T>
struct SweepKernels {
  // Entries between rows of the workspace, and bytes of it, and of the panels of Y.
  int64_t (*stride)(int64_t n);
  int64_t (*workspace_bytes)(int64_t n);
  int64_t (*panel_bytes)(int64_t n);
  // Pivots of a block, by which rows are cut too, and the width of a panel, which divides them.
  int64_t pivots, width;

  // W of the pivots k0 <= k < k0 + count, as (pivots, pivots) row-major, zeros above the diagonal and past count.
  // Returns 0 or the order (counted from k0) of the first leading minor that is not positive or not finite.
  int32_t (*pivot)(const T* work, int64_t n, int64_t k0, int64_t count, T* w);
  // Panels p0 <= p < p1 of Y.
  void (*panels)(const T* work, int64_t n, int64_t k0, int64_t count, const T* w, int64_t p0, int64_t p1, void* y);
  // N := N + Y Y^T in rows row0 <= i < row1 (multiples of pivots, or the end); count is that of `panels`.
  void (*update)(T* work, int64_t n, int64_t k0, int64_t count, const void* y, int64_t row0, int64_t row1);
};

// Between a matrix of type S and a workspace of type T.
template <class S, class T>
struct SweepCopies {
  // N := -(f + damping I), rows row0 <= i < row1 (multiples of pivots, or the end) and what pads them. False when an
  // entry of f's lower triangle is not finite; the strict upper one is never read.
  bool (*load)(const S* f, int64_t row_stride, int64_t col_stride, int64_t n, double damping, int64_t row0,
               int64_t row1, T* work);
  // Rows row0 <= i < row1 (multiples of pivots, or the end) of x (n, n, contiguous) from the lower triangle of N. False
  // when one of their entries up to the diagonal is not finite.
  bool (*unload)(const T* work, int64_t n, int64_t row0, int64_t row1, S* x);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const SweepKernels<float> sweep_f32;
extern const SweepKernels<double> sweep_f64;
extern const SweepKernels<float> large_sweep_f32;
extern const SweepKernels<double> large_sweep_f64;
extern const SweepCopies<float, float> sweep_copies_f32;
extern const SweepCopies<double, double> sweep_copies_f64;
extern const SweepCopies<float, double> sweep_copies_f32_in_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
