// cuSOLVER's batched symmetric eigensolver, found at run time: neither its headers nor a link to it are needed, so that
// the library builds where they are missing and runs beside the CUDA 12 or 13 that torch brought.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda/launch.h"

namespace kronfac::cuda {

struct SyevBatch {
  Element type;      // f32 or f64
  int64_t n, count;  // orders are all the same
  void* a;           // (count, n, n): lower triangles of column-major matrices in, orthonormal eigenvectors out
  void* w;           // (count, n): eigenvalues, ascending
  int32_t* failed;   // (count): not 0 where one did not converge
};

// "cuSOLVER 12.0.4 (/path)", or why there is none that has the batched solver (from 11.7.1 on, with CUDA 12.6.2).
const std::string& solver_description();
bool solver_available();

// Enqueues the batch on the stream of the current device; memory(bytes) gives memory of the device that lasts until the
// stream has come past. False, with nothing enqueued, where there is no batched solver or where it does not take these
// sizes; throws where it takes them and fails.
bool syev_batched(const SyevBatch& batch, int32_t device, Stream stream, const std::function<void*(size_t)>& memory);

}  // namespace kronfac::cuda
