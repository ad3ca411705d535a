// What all emulations of kernels share. `library` of emulation.py compiles it into every one of them, before the first
// line of its source.
//
// An emulation calls a kernel template once for each block of threads:
//
//   LaunchMemory dynamic(bytes);  // as the launcher computes them
//   for (...) kernel<T>(fresh(*block), fresh(*shared), dynamic.fresh<T>(), p, i);
//
// with a HostBlock and a struct of shared memory from std::make_unique. `fresh` makes what a block finds there as
// useless as on the GPU: all bits are ones, which is NaN, or -1. What a kernel reads before it has written it then
// shows in the result, and what lies beyond the end shows under `make sanitize`, as long as memory is exactly as large
// as what the launcher asks for. tests/cuda/conftest.py calls each emulation in every order of threads and compares the
// bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "cuda/block.cuh"

template <class State, int kThreads>
kronfac::cuda::HostBlock<State, kThreads>& fresh(kronfac::cuda::HostBlock<State, kThreads>& block) {
  block.forget();
  return block;
}
template <class Shared>
Shared& fresh(Shared& shared) {
  std::memset(static_cast<void*>(&shared), 0xff, sizeof shared);
  return shared;
}

// Dynamic shared memory, or workspace in global memory.
class LaunchMemory {
 public:
  explicit LaunchMemory(int64_t bytes) : bytes_(static_cast<size_t>(bytes)), data_(new unsigned char[bytes_]) {}
  template <class T>
  T* fresh() {
    std::memset(data_.get(), 0xff, bytes_);
    return static_cast<T*>(static_cast<void*>(data_.get()));
  }

 private:
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

// Numbered as ThreadOrder.
extern "C" void emulation_order(int order) {
  kronfac::cuda::thread_order = static_cast<kronfac::cuda::ThreadOrder>(order);
}
