// Kernels that are wrong on purpose, and their right twins: what the emulation has to tell apart.
#include "emulation.h"

namespace {

constexpr int kThreads = 64;
struct Nothing {};
struct Row {
  int entry[kThreads];
};

// out[t] := the entry that thread t + 1 writes; in the same phase where `racing`.
template <class Block>
void neighbours(Block& block, Row& shared, bool racing, int* out) {
  block.each([&](int thread, Nothing&) {
    shared.entry[thread] = thread;
    if (racing) out[thread] = shared.entry[(thread + 1) % kThreads];
  });
  block.each([&](int thread, Nothing&) {
    if (!racing) out[thread] = shared.entry[(thread + 1) % kThreads];
  });
}

}  // namespace

extern "C" void emulate_neighbours(bool racing, int* out) {
  kronfac::cuda::HostBlock<Nothing, kThreads> block;
  const auto shared = std::make_unique<Row>();
  neighbours(fresh(block), fresh(*shared), racing, out);
}

// Beyond the end of what a launch asked for, where `bytes` is less than 16.
extern "C" void emulate_store(int64_t bytes) {
  LaunchMemory memory(bytes);
  volatile float* const target = memory.fresh<float>();
  target[3] = 1.0f;
}
