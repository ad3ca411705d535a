// Stands in for cuBLAS (-DBLAS), for a cuSOLVER that prints its calls (-DSOLVER, -DOLD without the batched solver), or
// calls csrc/cuda/solver.cpp (otherwise).
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>

#if defined(BLAS)

extern "C" int cublasGetProperty(int which, int* value) {
  *value = which == 0 ? std::atoi(std::getenv("CUBLAS_RELEASE")) : -1;
  return 0;
}

#elif defined(SOLVER)

namespace {
int handles = 0, parameters = 0;
void* number(int n) { return reinterpret_cast<void*>(static_cast<intptr_t>(n)); }
int status(const char* of) { return std::getenv(of) == nullptr ? 0 : 3; }
long value(const void* p) { return static_cast<long>(reinterpret_cast<intptr_t>(p)); }
}  // namespace

extern "C" {
int cusolverGetVersion(int* version) {
  *version = 12004;
  return 0;
}
int cusolverDnCreate(void** handle) {
  *handle = number(100 + handles++);
  return status("FAIL_CREATE");
}
int cusolverDnCreateParams(void** made) {
  *made = number(200 + parameters++);
  return 0;
}
int cusolverDnSetStream(void* handle, void* stream) {
  std::printf("stream %ld %ld\n", value(handle), value(stream));
  return 0;
}
#ifndef OLD
int cusolverDnXsyevBatched_bufferSize(void* handle, void* made, int mode, int triangle, int64_t n, int type_a,
                                      const void* a, int64_t lda, int type_w, const void* w, int type, size_t* device,
                                      size_t* host, int64_t count) {
  std::printf("size %ld %ld %d %d %ld %d %ld %ld %d %ld %d %ld\n", value(handle), value(made), mode, triangle, long(n),
              type_a, value(a), long(lda), type_w, value(w), type, long(count));
  *device = 1000;
  *host = 24;
  return status("REFUSE");
}
int cusolverDnXsyevBatched(void* handle, void* made, int mode, int triangle, int64_t n, int type_a, void* a,
                           int64_t lda, int type_w, void* w, int type, void* device, size_t device_bytes, void* host,
                           size_t host_bytes, int* info, int64_t count) {
  for (size_t i = 0; i < host_bytes; ++i) static_cast<char*>(host)[i] = 1;
  std::printf("solve %ld %ld %d %d %ld %d %ld %ld %d %ld %d %ld %ld %ld %ld %ld\n", value(handle), value(made), mode,
              triangle, long(n), type_a, value(a), long(lda), type_w, value(w), type, value(device), long(device_bytes),
              long(host_bytes), value(info), long(count));
  return status("FAIL_SOLVE");
}
#endif
}

#else

#include "cuda/solver.h"

extern "C" const char* kronfac_cuda_solver();

namespace {
void solve(kronfac::cuda::Element type, int32_t device, intptr_t stream) {
  using namespace kronfac::cuda;
  const auto at = [](intptr_t address) { return reinterpret_cast<void*>(address); };
  const SyevBatch batch{type, 128, 5, at(1), at(2), static_cast<int32_t*>(at(3))};
  try {
    const bool done = syev_batched(batch, device, reinterpret_cast<Stream>(stream), [&](size_t bytes) {
      std::printf("memory %ld\n", long(bytes));
      return at(4);
    });
    std::printf("%s\n", done ? "done" : "refused");
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
  }
}
}  // namespace

extern "C" void solve_some() {
  using kronfac::cuda::Element;
  std::printf("%s\n%d\n", kronfac_cuda_solver(), kronfac::cuda::solver_available() ? 1 : 0);
  solve(Element::f32, 0, 7);
  solve(Element::f64, 0, 7);
  solve(Element::f32, 0, 8);
  solve(Element::f32, 1, 7);
  std::fflush(stdout);
}

#endif
