// The general matrix product underneath the operators.
//
//   C := beta * C + alpha * A B        A (m, k), B (k, n), C (m, n)
//
// * C has row stride ldc and unit column stride, element type T (float or double), which is also the type of every
// product and
//   sum. beta == 0 never reads C, so C may hold anything, NaN included. alpha * A B is formed even for k == 0 (zeros).
// * A and B have any strides (zero and negative ones too), in elements, and any Element; they are converted to T while
// packing.
// * A sum over k runs in T inside blocks of as many terms as suit the caches, 512 at most, and the blocks are added to
// C in ascending order: the result depends on neither m, n nor the place of an entry in C. Single-threaded;
// partitioning C (never k) among threads keeps it bit-equal, given the same `split`.
// * C must not overlap A or B.
#pragma once

#include <cstdint>

#include "kernels/blocks.h"

namespace kronfac::kernels {

enum class Element : int32_t { f32, f64, bf16, f16 };

// A read-only matrix: entry (i, j) lies at data + i * row_stride + j * col_stride, in elements of `type`.
struct Matrix {
  const void* data;
  Element type;
  int64_t row_stride, col_stride;

  constexpr Matrix transposed() const { return {data, type, col_stride, row_stride}; }
};

// Where C lies in a larger symmetric matrix. lower: entries whose global row is less than their global column are
// neither computed (beyond register tiles) nor written.
struct Triangle {
  bool lower = false;
  int64_t row0 = 0, col0 = 0;
};

// split: on matrix units, from float32 operands split in three (split.h), where the instruction set has them. Whether
// that pays is a question of the whole product's sizes (gemm_split_pays in Table): ask before C is cut.
// scratch: gemm_scratch_* bytes (see Table), aligned to 64.
using GemmF32 = void (*)(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta,
                         float* c, int64_t ldc, const Triangle& triangle, bool split, void* scratch);
using GemmF64 = void (*)(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta,
                         double* c, int64_t ldc, const Triangle& triangle, bool split, void* scratch);
// Bytes of scratch that a product of at most these sizes needs.
using GemmScratch = int64_t (*)(int64_t m, int64_t n, int64_t k);
using GemmSplitPays = bool (*)(int64_t m, int64_t n, int64_t k);

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
void gemm_f32(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, float* c,
              int64_t ldc, const Triangle& triangle, bool split, void* scratch);
void gemm_f64(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, double* c,
              int64_t ldc, const Triangle& triangle, bool split, void* scratch);
int64_t gemm_scratch_f32(int64_t m, int64_t n, int64_t k);
int64_t gemm_scratch_f64(int64_t m, int64_t n, int64_t k);
bool gemm_split_pays(int64_t m, int64_t n, int64_t k);
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
