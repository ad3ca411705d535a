// Kernel templates of orthogonalize.h.
#pragma once

#include "cuda/block.cuh"
#include "cuda/orthogonalize.h"

namespace kronfac::cuda {

template <class T>
struct OrthogonalizeShared {
  T w[kOrthogonalizeWidest];
};
struct OrthogonalizeState {
  double sum;
};

// One sweep over one block of columns.
template <class T, class Block>
KRONFAC_DEVICE void orthogonalize_sweep(Block& block, OrthogonalizeShared<T>& shared, const Orthogonalize& p,
                                        int64_t number, bool subtract, bool project) {
  using State = OrthogonalizeState;
  const int64_t begin = number * p.width;
  const int width = static_cast<int>(p.n - begin < p.width ? p.n - begin : p.width);
  const T* v = static_cast<const T*>(p.v) + begin * p.column_stride;
  T* w = static_cast<T*>(p.w) + begin * p.w_stride;
  block.each([&](int thread, State&) {
    for (int j = thread; j < width; j += kOrthogonalizeThreads) {
      T value = w[j * p.w_stride];
      if (subtract) {
        const T* entry = v + j * p.column_stride;
        // Loads that do not wait for one another: memory is kept busy by what is under way.
        constexpr int kTogether = 8;
        int64_t i = 0;
        for (; i + kTogether <= p.m; i += kTogether) {
          T loaded[kTogether];
          KRONFAC_UNROLL
          for (int e = 0; e < kTogether; ++e) loaded[e] = entry[(i + e) * p.row_stride];
          KRONFAC_UNROLL
          for (int e = 0; e < kTogether; ++e) value -= static_cast<T>(p.latest[i + e]) * loaded[e];
        }
        for (; i < p.m; ++i) value -= static_cast<T>(p.latest[i]) * entry[i * p.row_stride];
        w[j * p.w_stride] = value;
      }
      shared.w[j] = value;
    }
  });
  if (!project) return;
  // A warp takes a row, its lanes the columns.
  constexpr int kWarps = kOrthogonalizeThreads / 32;
  for (int64_t first = 0; first < p.m; first += kWarps) {
    block.each_warp([&](int thread, State& state) {
      const int64_t i = first + thread / 32;
      T sum = 0;
      if (i < p.m) {
        const T* row = v + i * p.row_stride;
        KRONFAC_UNROLL_BY(8)
        for (int j = thread % 32; j < width; j += 32) sum += row[j * p.column_stride] * shared.w[j];
      }
      state.sum = static_cast<double>(sum);
    });
    block.warp_sum([](State& state) -> double& { return state.sum; });
    block.each_warp([&](int thread, State& state) {
      const int64_t i = first + thread / 32;
      if (thread % 32 == 0 && i < p.m) p.partial[i * p.blocks + number] = state.sum;
    });
  }
}

// Coefficient number `row` from the projections of all blocks, added in a fixed order. A warp is enough.
template <class T, class Block>
KRONFAC_DEVICE void orthogonalize_coefficient(Block& block, const Orthogonalize& p, int64_t row, bool first) {
  using State = OrthogonalizeState;
  block.each_warp([&](int thread, State& state) {
    state.sum = 0;
    for (int64_t at = thread; at < p.blocks; at += 32) state.sum += p.partial[row * p.blocks + at];
  });
  block.warp_sum([](State& state) -> double& { return state.sum; });
  block.each_warp([&](int thread, State& state) {
    if (thread != 0) return;
    p.latest[row] = state.sum;
    p.total[row] = first ? state.sum : p.total[row] + state.sum;
    static_cast<T*>(p.coefficients)[row] = static_cast<T>(p.total[row]);
  });
}

}  // namespace kronfac::cuda
