// (F_i + damping_i I)^-1 for a list of symmetric matrices of different sizes on the GPU, without a wait for the device.
//
// A sweep over pivots turns a symmetric positive matrix A into -A^-1 in place: with d = a_kk,
//   a_kk := -1 / d,  a_ik := a_ik / d,  a_ij := a_ij - a_ik a_jk / d.
// Small matrices are swept in the shared memory of one block of threads, in double. Larger ones are swept by blocks of
// kPivots pivots: with U the columns of A beside them and W the inverse of the Cholesky factor of the diagonal block
// (factor.cuh), Y := -U W^T and W^T in the rows of the pivots, their rows and columns of A := 0, then A := A - Y Y^T on
// the lower triangle; each is one launch for all matrices that have that many blocks. The largest go through cuBLAS:
// blocked_inverse.h.
//
// The list travels as an argument of the kernels, in batches of kMostMatrices: no copy to the device, and a launch can
// be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

inline constexpr int kInverseThreads = 256;
inline constexpr int kSmallOrder = 128;  // 66 KiB of shared memory: three blocks on a multiprocessor of 200 KiB
inline constexpr int kPivots = 64;
inline constexpr int kMostMatrices = 48;  // all arguments of a kernel together take 4 KiB at most

struct InverseProblem {
  const void* f;
  int64_t row_stride, column_stride;
  void* x;           // (n, n), contiguous
  void* work;        // inverse_work(n) numbers where n > kSmallOrder
  int32_t n, index;  // index: its place in damping and info
};

// Numbers of workspace of a matrix: W, Y.
inline int64_t inverse_work(int64_t n) { return n <= kSmallOrder ? 0 : kPivots * (kPivots + n); }

struct InverseBatch {
  InverseProblem problem[kMostMatrices];  // by descending order n, all above kSmallOrder or none
  int32_t first[kMostMatrices + 1];       // the first block of threads of each matrix in this launch
  int32_t count;
  const void* damping;
  int64_t damping_stride;
  int32_t* info;  // 0, the order of the first leading minor that is not positive, or -1: f, damping or x is not finite

  KRONFAC_BOTH static int32_t blocks(int32_t n) { return (n + kPivots - 1) / kPivots; }
  KRONFAC_BOTH static int32_t tiles(int32_t n) { return blocks(n) * (blocks(n) + 1) / 2; }  // of the lower triangle

  // Counts the blocks of threads: per_matrix(n) for each matrix with more than `least` rows.
  template <class PerMatrix>
  int32_t layout(int32_t least, const PerMatrix& per_matrix) {
    return lay_out(problem, count, first, least, per_matrix);
  }
};

// batch.problem of one kind and type; info is zeroed before.
void invert_batch(Element type, InverseBatch& batch, Stream stream);

// Of large matrices only the beginning, the lower triangles of F + damping I, or the end: minus and mirror, or NaN.
enum class InversePart { load, finish, poison };
void invert_part(InversePart part, Element type, InverseBatch& batch, Stream stream);

}  // namespace kronfac::cuda
