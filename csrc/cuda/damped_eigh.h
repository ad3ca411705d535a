// Eigendecompositions of F_i + damping_i I for a list of symmetric matrices of different sizes on the GPU.
//
// Orders up to kJacobiOrder are solved by Jacobi rotations in shared memory (jacobi.cuh), kEighMatrices of a class of
// orders in a launch. Larger ones are left to a library that works on a copy: `measure` finds the power of two that
// brings the entries to the order of 1, so that no squares overflow or vanish, and what is not finite; `copy` writes
// the scaled copy, or the identity in place of what is not finite, because a library may hang on it; `results` scales
// back, adds the damping and copies, or writes NaN where there is no decomposition. Nothing of it waits for the device.
//
// Bytes of the three, n x n of size s: measure reads n^2 / 2 s, copy reads that and writes n^2 s, results reads and
// writes n^2 s. 64 float32 matrices of n = 512 move 0.3 GB: 0.1 ms at 3 TB/s, where solving them takes tens of
// milliseconds.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

// A and V in 153 KiB of shared memory: a block of threads may have 163 on sm_80, 227 on sm_90 (see eigh_small_order).
inline constexpr int kJacobiOrder = 112;
// Orders of a launch: its matrices all take the shared memory of the largest. 15 KiB up to 32 (a multiprocessor has
// 228, or 164 on sm_80), 53 KiB up to 64.
inline constexpr int kJacobiClasses[] = {32, 64, kJacobiOrder};
// Enough threads to keep shared memory busy, few enough for the registers (80 to 90) of several small matrices.
inline constexpr int kJacobiThreads[] = {128, 256, 512};
inline constexpr int jacobi_class(int64_t n) { return n <= kJacobiClasses[0] ? 0 : n <= kJacobiClasses[1] ? 1 : 2; }

inline constexpr int kEighThreads = 256;  // of the kernels around a library
inline constexpr int kEighTile = 32;
inline constexpr int kEighMatrices = 48;  // all arguments of a kernel together take 4 KiB at most

struct EighProblem {
  const void* f;
  int64_t row_stride, column_stride;
  void* values;   // (n,)
  void* vectors;  // (n, n), one eigenvector after another
  // For a library: the scaled copy (n, n), where it leaves the eigenvectors one after another; the eigenvalues,
  // ascending; not 0 where it failed (or null).
  void *a, *w;
  const int32_t* failed;
  int32_t n, index;  // index: its place in damping, info and exponent
};

struct EighBatch {
  EighProblem problem[kEighMatrices];  // for eigh_small: orders of one class
  int32_t first[kEighMatrices + 1];    // the first block of threads of each matrix in this launch
  int32_t count;
  const void* damping;
  int64_t damping_stride;
  int32_t* info;      // 0; 1: did not converge, or not finite in its type; -1: f (lower triangle) or damping not finite
  int32_t* exponent;  // for a library: the copy is 2^-exponent f

  template <class PerMatrix>
  int32_t layout(const PerMatrix& per_matrix) {
    return lay_out(problem, count, first, 0, per_matrix);
  }
};

// The largest order that the current device has the shared memory for: kJacobiOrder, or 89 on the smaller devices of
// sm_80's and later families, which have 99 KiB for a block of threads.
int32_t eigh_small_order();
// All of it, for orders of one class, none above eigh_small_order().
void eigh_small(Element type, EighBatch& batch, Stream stream);
// Before and after a library.
void eigh_load(Element type, EighBatch& batch, Stream stream);
void eigh_finish(Element type, EighBatch& batch, Stream stream);

}  // namespace kronfac::cuda
