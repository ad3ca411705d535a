// One damped inverse by kernels/inverse_sweep.h: its blocks in order, the parts of each shared among threads.
#pragma once

#include "cpu/stages.h"
#include "kernels/inverse_sweep.h"

namespace kronfac::cpu {

// In type T, for a matrix of type S.
template <class S, class T>
class InverseSweep {
 public:
  InverseSweep(const kernels::SweepKernels<T>& kernels, const kernels::SweepCopies<S, T>& copies)
      : kernels_(kernels), copies_(copies) {}

  int64_t bytes(int64_t n) const {
    return Scratch::rounded(kernels_.workspace_bytes(n)) + Scratch::rounded(kernels_.panel_bytes(n)) +
           Scratch::rounded(kernels_.pivots * kernels_.pivots * static_cast<int64_t>(sizeof(T)));
  }

  // memory: bytes(n). Returns 0, the order of the first leading minor that is not positive, or -1 when f or its inverse
  // is not finite; where it is not 0, x is undefined.
  int32_t run(const S* f, int64_t row_stride, int64_t col_stride, int64_t n, double damping, S* x, int64_t threads,
              std::byte* memory) const {
    T* work = reinterpret_cast<T*>(memory);
    memory += Scratch::rounded(kernels_.workspace_bytes(n));
    std::byte* y = memory;
    T* w = reinterpret_cast<T*>(memory + Scratch::rounded(kernels_.panel_bytes(n)));
    std::atomic<bool> finite{true};
    std::atomic<int32_t> info{0};
    const int64_t pivots = kernels_.pivots, blocks = (n + pivots - 1) / pivots, last = 2 * blocks + 1;
    const auto start = [&](int64_t block) { return std::min(n, block * pivots); };
    const auto length = [&](int64_t block) { return start(block + 1) - start(block); };
    const auto pivot = [&](int64_t block) {
      if (const int32_t bad = kernels_.pivot(work, n, start(block), length(block), w))
        info = static_cast<int32_t>(start(block)) + bad;
    };
    run_stages(
        last + 1, threads, [&](int64_t) { return blocks; },
        [&](int64_t stage, int64_t task) {
          if (!finite || info != 0) return;
          if (stage == 0) {
            if (!copies_.load(f, row_stride, col_stride, n, damping, start(task), start(task + 1), work)) {
              finite = false;
            } else if (task == 0) {
              pivot(0);
            }
            return;
          }
          if (stage == last) {
            const int64_t block = blocks - 1 - task;
            if (!copies_.unload(work, n, start(block), start(block + 1), x)) finite = false;
            return;
          }
          const int64_t block = (stage - 1) / 2;
          if (stage % 2 == 1) {
            const int64_t panels = pivots / kernels_.width, all = (n + kernels_.width - 1) / kernels_.width;
            kernels_.panels(work, n, start(block), length(block), w, task * panels, std::min(all, (task + 1) * panels),
                            y);
            return;
          }
          // The rows of the next block first, so that its pivots are ready when the longest rows are.
          const int64_t next = block + 1;
          int64_t rows = next;
          if (next == blocks) {
            rows = blocks - 1 - task;
          } else if (task > 0) {
            rows = blocks - task > next ? blocks - task : blocks - task - 1;
          }
          kernels_.update(work, n, start(block), length(block), y, start(rows), start(rows + 1));
          if (rows == next) pivot(next);
        });
    return !finite ? -1 : info.load();
  }

 private:
  const kernels::SweepKernels<T>& kernels_;
  const kernels::SweepCopies<S, T>& copies_;
};

}  // namespace kronfac::cpu
