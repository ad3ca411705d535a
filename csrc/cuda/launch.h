// What the glue and the kernels' launchers share: element types, streams, errors. No torch, and no CUDA header.
#pragma once

#include <cstdint>

// A small function that launchers, glue and kernels call.
#if defined(__CUDACC__)
#define KRONFAC_BOTH __host__ __device__
#else
#define KRONFAC_BOTH
#endif

struct CUstream_st;  // cudaStream_t points at one

namespace kronfac::cuda {

using Stream = CUstream_st*;

enum class Element { f32, f64, bf16, f16 };

// Throws when the launch before it was refused. `kernel` is named in the message.
void check_launch(const char* kernel);

}  // namespace kronfac::cuda
