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

// Where the blocks of threads of each problem of a list begin in a launch: first[i], of problems by descending order n,
// per_problem(n) blocks for each with more than `least` rows. Returns how many there are in all.
template <class Problem, class PerProblem>
int32_t lay_out(const Problem* problem, int32_t count, int32_t* first, int32_t least, const PerProblem& per_problem) {
  first[0] = 0;
  for (int32_t at = 0; at < count; ++at) {
    first[at + 1] = first[at] + (problem[at].n > least ? per_problem(problem[at].n) : 0);
  }
  return first[count];
}

// Throws when the launch before it was refused. `kernel` is named in the message.
void check_launch(const char* kernel);

}  // namespace kronfac::cuda
