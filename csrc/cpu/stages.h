// Stages of tasks with barriers between them, inside one parallel region.
#pragma once

#include <thread>

#include "cpu/parallel.h"

namespace kronfac::cpu {

// Calls f(stage, task) for every task < count(stage) of every stage, a stage after all of the one before it. A thread
// waits only for tasks that others have begun, so that any number of threads, one included, gets to the end; it waits
// awake, since stages may be shorter than waking takes.
template <class Count, class F>
void run_stages(int64_t stages, int64_t threads, const Count& count, const F& f) {
  if (threads <= 1) {
    for (int64_t stage = 0; stage < stages; ++stage) {
      for (int64_t task = 0; task < count(stage); ++task) f(stage, task);
    }
    return;
  }
  struct alignas(64) Progress {
    std::atomic<int64_t> begun{0}, done{0};
  };
  std::vector<Progress> progress(static_cast<size_t>(stages));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t stage = 0; stage < stages; ++stage) {
        Progress& at = progress[static_cast<size_t>(stage)];
        const int64_t tasks = count(stage);
        for (int64_t task = at.begun++; task < tasks; task = at.begun++) {
          f(stage, task);
          ++at.done;
        }
        constexpr int kSpins = 20000;  // tens of microseconds, before another process gets the core
        for (int spin = 0; at.done < tasks; ++spin) {
          if (spin > kSpins) std::this_thread::yield();
        }
      }
    }
  });
}

}  // namespace kronfac::cpu
