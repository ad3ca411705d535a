// Kernels as a sequence of phases, so that the same source runs on the GPU and, thread by thread, in the tests of a
// machine without one.
//
// A kernel is a function template over a block of threads. What threads do between two barriers is a phase:
// block.each([&](int thread, State& state) {...}). On the GPU every thread runs the phase and then waits for the
// others; on the CPU the phase runs for one thread after another. `state` is what a thread keeps in registers from
// phase to phase. Everything outside of a phase is the same for all threads of a block.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KRONFAC_DEVICE __device__ __forceinline__
#define KRONFAC_UNROLL _Pragma("unroll")
#define KRONFAC_PRAGMA(text) _Pragma(#text)
#define KRONFAC_UNROLL_BY(n) KRONFAC_PRAGMA(unroll n)
#else
#include <cstddef>
#include <cstring>
#include <vector>
#define KRONFAC_DEVICE inline
#define KRONFAC_UNROLL
#define KRONFAC_UNROLL_BY(n)
#endif

namespace kronfac::cuda {

#if defined(__CUDACC__)
template <class State_>
struct DeviceBlock {
  using State = State_;
  State state;

  template <class Phase>
  __device__ __forceinline__ void each(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), state);
    __syncthreads();
  }

  // A phase whose results no other thread of the block reads before the next barrier, but perhaps warp_sum and warp: no
  // barrier of its own.
  template <class Phase>
  __device__ __forceinline__ void each_warp(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), state);
  }

  // value(state) of every thread := the sum over the 32 threads of its warp, in a fixed order.
  template <class Value>
  __device__ __forceinline__ void warp_sum(const Value& value) {
    double& mine = value(state);
    KRONFAC_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, distance);
  }

  // An instruction that the 32 threads of a warp carry out together (tensor_core.cuh); lane(thread, state) is what one
  // of them contributes and receives. Orders nothing but itself.
  template <class Op, class Lane>
  __device__ __forceinline__ void warp(const Lane& lane) {
    Op::run(lane(static_cast<int>(threadIdx.x), state));
  }

  // Within a phase: starts to copy `bytes` <= 16 bytes from global to shared memory, where 16 are written: the others
  // become 0. Both addresses are multiples of 16.
  __device__ __forceinline__ static void copy_async(void* to, const void* from, int bytes) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(__cvta_generic_to_global(from)), "r"(bytes)
        : "memory");
  }
  // Between phases: the copies begun since the last call are a group.
  __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // A barrier, after which all groups but the last kLeft have arrived.
  template <int kLeft>
  __device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
    __syncthreads();
  }
};
#else
// The order in which HostBlock runs the threads of a phase, chosen by the tests. On the GPU there is none: a result
// that depends on it is a race, one thread reading or overwriting what another one writes in the same phase. Any two
// threads come both ways round in the first two orders; the third differs from phase to phase. What is not seen here is
// a missing barrier, because each_warp has none on the GPU and ends everywhere at once here.
enum class ThreadOrder { ascending, descending, shuffled };
inline ThreadOrder thread_order = ThreadOrder::ascending;

template <class State_, int kThreads>
struct HostBlock {
  using State = State_;
  State state[kThreads];
  int sequence[kThreads];
  uint32_t random = 1;

  HostBlock() {
    forget();
    for (int i = 0; i < kThreads; ++i) sequence[i] = thread_order == ThreadOrder::descending ? kThreads - 1 - i : i;
  }
  // Registers hold anything at first: here NaN, and -1 as an integer.
  void forget() { std::memset(static_cast<void*>(state), 0xff, sizeof state); }

  template <class Phase>
  void each(const Phase& phase) {
    if (thread_order == ThreadOrder::shuffled) shuffle();
    for (const int thread : sequence) phase(thread, state[thread]);
  }
  template <class Phase>
  void each_warp(const Phase& phase) {
    each(phase);
  }

  template <class Value>
  void warp_sum(const Value& value) {
    for (int first = 0; first < kThreads; first += 32) {
      for (int distance = 16; distance > 0; distance /= 2) {
        double old[32];
        for (int lane = 0; lane < 32; ++lane) old[lane] = value(state[first + lane]);
        for (int lane = 0; lane < 32; ++lane) value(state[first + lane]) += old[lane ^ distance];
      }
    }
  }

  template <class Op, class Lane>
  void warp(const Lane& lane) {
    for (int first = 0; first < kThreads; first += 32) {
      decltype(lane(0, state[0])) lanes[32];
      for (int i = 0; i < 32; ++i) lanes[i] = lane(first + i, state[first + i]);
      Op::run(lanes);
    }
  }

  // A copy arrives when it is waited for and not before: until then its target is NaN.
  struct Copy {
    void* to;
    const void* from;
    int bytes, group;
  };
  std::vector<Copy> copies;
  int groups = 0;

  void copy_async(void* to, const void* from, int bytes) {
    std::memset(to, 0xff, 16);
    // What faults on the GPU never arrives here.
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) return;
    copies.push_back({to, from, bytes, groups});
  }
  void commit_copies() { ++groups; }
  template <int kLeft>
  void await_copies() {
    size_t arrived = 0;
    for (; arrived < copies.size() && copies[arrived].group < groups - kLeft; ++arrived) {
      const Copy& copy = copies[arrived];
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(arrived));
  }

 private:
  // Fisher and Yates with a linear congruential generator.
  void shuffle() {
    for (uint32_t i = kThreads - 1; i > 0; --i) {
      random = random * 1664525u + 1013904223u;
      const uint32_t other = (random >> 8) % (i + 1);
      const int thread = sequence[i];
      sequence[i] = sequence[other], sequence[other] = thread;
    }
  }
};
#endif

// The problem of a list that a block of threads works at: batch.first[i] is the first block of problem i, and
// batch.first[count] the number of all (lay_out in launch.h).
template <class Batch>
KRONFAC_DEVICE int32_t problem_of(const Batch& batch, int32_t block) {
  int32_t low = 0, high = batch.count;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (batch.first[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Of blocks that keep nothing from phase to phase.
struct NoState {};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Numbers as they lie in memory, in the type that sums are kept in.
template <class T>
KRONFAC_DEVICE T widened(float x) {
  return static_cast<T>(x);
}
template <class T>
KRONFAC_DEVICE T widened(double x) {
  return static_cast<T>(x);
}
#if defined(__CUDACC__)
template <class T>
KRONFAC_DEVICE T widened(BFloat16 x) {
  return static_cast<T>(__uint_as_float(static_cast<uint32_t>(x.bits) << 16));
}
template <class T>
KRONFAC_DEVICE T widened(Half x) {
  return static_cast<T>(__half2float(__ushort_as_half(x.bits)));
}
#else
template <class T>
T widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<T>(value);
}
template <class T>
T widened(Half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof value);
  return static_cast<T>(value);
}
#endif

// Rounded to nearest.
template <class Out, class T>
struct Narrowed {
  KRONFAC_DEVICE static Out of(T x) { return static_cast<Out>(x); }
};
#if defined(__CUDACC__)
template <class T>
struct Narrowed<BFloat16, T> {
  KRONFAC_DEVICE static BFloat16 of(T x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))}; }
};
template <class T>
struct Narrowed<Half, T> {
  KRONFAC_DEVICE static Half of(T x) { return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))}; }
};
#else
template <class T>
struct Narrowed<BFloat16, T> {
  static BFloat16 of(T x) {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};
template <class T>
struct Narrowed<Half, T> {
  static Half of(T x) {
    const _Float16 value = static_cast<_Float16>(static_cast<float>(x));
    Half half;
    std::memcpy(&half.bits, &value, sizeof value);
    return half;
  }
};
#endif

}  // namespace kronfac::cuda
