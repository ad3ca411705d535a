// Matrix products by cuBLAS, through the handle that torch keeps for this thread and device: its stream, its workspace,
// its setting of TF32.
//
// Neither headers nor libraries of cuBLAS are needed to build: the few functions in use are looked up, once, among what
// torch has loaded. A torch without them (cuBLAS linked into it) leaves available() false, and callers use kernels of
// their own; `kronfac info` tells which. A plan is a list of Gemm made by functions that know no torch, so that tests
// run it with loops.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace kronfac::cuda {

// c := alpha op(a) op(b) + beta c with op(a) (m, k), op(b) (k, n), c (m, n): column-major, the first index is the one
// whose neighbours are neighbours in memory. Sums are kept in float32, in float64 where type is f64. Where beta is 0,
// c is not read.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  int64_t lda = 0, ldb = 0, ldc = 0;  // at least the rows of the matrix as it lies in memory
  bool a_transposed = false, b_transposed = false;
  Element type = Element::f32;    // of a and b
  Element c_type = Element::f32;  // `type`, or f32 where that is narrower
  double alpha = 1, beta = 0;
  // A batch: `count` such products, that many numbers apart; or, with `pointers`, where a, b and c are addresses of
  // arrays of `count` addresses, in the device's memory.
  int64_t count = 1, a_stride = 0, b_stride = 0, c_stride = 0;
  bool pointers = false;
};

enum class Precision {
  as_torch,  // float32 products may round their factors to TF32 where torch's matmul may
  full,      // never
};

// Whether cuBLAS was found. Asks neither a device nor torch.
bool available();

// "13.1.0", or "" where cuBLAS was not found. Asks no device.
const char* blas_version();

// Whether torch's matmul may round float32 factors to TF32; false where cuBLAS was not found.
bool tf32_allowed();

// The products one after another on torch's current stream of the current device. Needs available(). Throws where one
// is refused, with the name of the call and the status; nothing waits for the device, and a CUDA graph can capture it.
void run(const std::vector<Gemm>& gemms, Precision precision = Precision::as_torch);

// torch's handle for the current device, set to its current stream.
void* blas_handle();

}  // namespace kronfac::cuda
