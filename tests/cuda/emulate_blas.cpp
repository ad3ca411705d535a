// csrc/cuda/blas.cpp for tests: torch's handle is that of fake_cublas.cpp, where that is linked.
#include <dlfcn.h>

#include <cstring>
#include <exception>

#include "cuda/blas.h"

using namespace kronfac::cuda;

#if defined(WITH_CUBLAS)
extern "C" void* fake_handle();
void* kronfac::cuda::blas_handle() { return fake_handle(); }
#else
void* kronfac::cuda::blas_handle() { return nullptr; }
#endif

extern "C" {

bool blas_available() { return available(); }
bool blas_tf32_allowed() { return tf32_allowed(); }

// A list of `count` equal products; numbers: m, n, k, lda, ldb, ldc, transposed a, b, type, c_type, batch, its three
// strides, pointers. Returns whether it went well; else the message is in `error`.
bool blas_run(int64_t count, const int64_t* numbers, const void* a, const void* b, void* c, double alpha, double beta,
              bool full, char* error) {
  Gemm g{};
  g.m = numbers[0], g.n = numbers[1], g.k = numbers[2], g.lda = numbers[3], g.ldb = numbers[4], g.ldc = numbers[5];
  g.a_transposed = numbers[6] != 0, g.b_transposed = numbers[7] != 0;
  g.type = static_cast<Element>(numbers[8]), g.c_type = static_cast<Element>(numbers[9]);
  g.count = numbers[10], g.a_stride = numbers[11], g.b_stride = numbers[12], g.c_stride = numbers[13];
  g.pointers = numbers[14] != 0;
  g.a = a, g.b = b, g.c = c, g.alpha = alpha, g.beta = beta;
  try {
    run(std::vector<Gemm>(static_cast<size_t>(count), g), full ? Precision::full : Precision::as_torch);
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), 255);
    return false;
  }
  return true;
}
}
