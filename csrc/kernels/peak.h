// What the hardware can do with this instruction set: loops that do nothing but multiply-adds in registers, or nothing
// but move memory. Benchmarks divide by what these reach.
#pragma once

#include <cstdint>

namespace kronfac::kernels {

template <class T>
struct PeakKernels {
  // Runs `repeats` rounds of x := a x + b on independent vectors in registers and returns the number of floating-point
  // operations made (two per multiply-add and lane). `state` holds state_size entries, read and written.
  int64_t (*multiply_add)(int64_t repeats, T* state);
  int64_t state_size;
  // to[i] := from[i], i < n, with ordinary stores (a line that is written is read first).
  void (*copy)(const T* from, T* to, int64_t n);
  // Sum of from[i], i < n.
  T (*sum)(const T* from, int64_t n);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const PeakKernels<float> peak_f32;
extern const PeakKernels<double> peak_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
