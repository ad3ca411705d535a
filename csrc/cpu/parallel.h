// Sharing independent tasks among threads. Results must not depend on which worker runs a task: then they do not depend
// on scheduling either. Nothing may throw inside: check and allocate before.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "common/stable.h"

namespace kronfac::cpu {

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// As many threads as each get `least` multiply-adds of `work`: waking one takes as long as some hundred thousand.
inline int64_t worthwhile_threads(double work, double least) {
  return work < 2 * least ? 1 : std::min(static_cast<int64_t>(work / least), thread_count());
}

// Memory for packed panels and the like: uninitialised, aligned to cache lines. Each thread keeps the last block it
// gave back, up to kKept bytes, so that repeated calls do not fault in fresh pages.
class Scratch {
 public:
  static constexpr size_t alignment = 64;
  explicit Scratch(int64_t bytes) {
    if (kept().bytes >= bytes && kept().data) {
      block_ = std::exchange(kept(), Block{});
    } else {
      block_ = {
          Pointer(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{alignment}))),
          bytes};
    }
  }
  ~Scratch() {
    if (block_.bytes <= kKept && block_.bytes > kept().bytes) kept() = std::move(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T = void>
  T* at(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(block_.data.get() + byte_offset);
  }
  // Sizes laid out one after another stay aligned when each is rounded up.
  static constexpr int64_t rounded(int64_t bytes) {
    return (bytes + static_cast<int64_t>(alignment) - 1) / static_cast<int64_t>(alignment) *
           static_cast<int64_t>(alignment);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kKept = 0;  // a block that is larger than asked for would hide what is written past its end
#else
  static constexpr int64_t kKept = int64_t{16} << 20;
#endif
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{alignment}); }
  };
  using Pointer = std::unique_ptr<std::byte, Free>;
  struct Block {
    Pointer data;
    int64_t bytes = 0;
  };
  static Block& kept() {
    static thread_local Block block;
    return block;
  }
  Block block_;
};

// Task numbers by descending cost, equal costs in their own order.
inline std::vector<int64_t> largest_first(const std::vector<double>& costs) {
  std::vector<int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return costs[static_cast<size_t>(a)] > costs[static_cast<size_t>(b)]; });
  return order;
}

// Calls f(task, worker) once for every task; idle workers take the next one of the list, so give the largest first.
template <class F>
void run_tasks(const std::vector<int64_t>& tasks, int64_t workers, const F& f) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  workers = std::min(workers, count);
  if (workers <= 1) {
    for (const int64_t task : tasks) f(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) f(tasks[static_cast<size_t>(i)], worker);
    }
  });
}

}  // namespace kronfac::cpu
