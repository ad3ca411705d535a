// Kernel templates of precondition.h.
#pragma once

#include <cmath>

#include "cuda/precondition.h"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

template <class T>
struct ProductTile;
template <>
struct ProductTile<float> {
  using Tile = cuda::Tile<float, product_rows(false), kProductColumns, 8, 8, 4>;
};
template <>
struct ProductTile<double> {
  using Tile = cuda::Tile<double, product_rows(true), kProductColumns, 8, 4, 4>;
};

template <class T>
struct ProductShared {
  typename ProductTile<T>::Tile::Shared tile;
  double sums[kProductThreads / 32];
};
template <class T>
struct ProductState {
  typename ProductTile<T>::Tile::State tile;
  double sum;
};

// B: the type of b. Grad: that of what is rounded, and of other in `dot`.
template <Finish kFinish, class B, class Grad, class T, class Block>
KRONFAC_DEVICE void product_tile(Block& block, ProductShared<T>& shared, const ProductBatch& batch, int32_t number) {
  using Tile = typename ProductTile<T>::Tile;
  using State = ProductState<T>;
  constexpr bool kRound = kFinish == Finish::dot || kFinish == Finish::rounded;
  constexpr bool kSum = kFinish == Finish::dot || kFinish == Finish::divide;
  int32_t low = 0, high = batch.count;  // first[low] <= number < first[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (batch.first[middle] <= number ? low : high) = middle;
  }
  const Product& p = batch.problem[low];
  const int32_t across = (p.n + kProductColumns - 1) / kProductColumns, local = number - batch.first[low];
  const int64_t row0 = local / across * int64_t{Tile::kRows}, column0 = local % across * int64_t{kProductColumns};
  const Operand<T> a{static_cast<const T*>(p.a), p.a_k, p.a_row, p.m, false};
  const Operand<B> b{static_cast<const B*>(p.b), p.b_k, p.b_column, p.n, false};
  block.each([&](int, State& state) { Tile::clear(state.tile); });
  int64_t k = 0;
  Tile::run(
      block, shared.tile, a.along_k(), b.along_k(), (p.k + Tile::kDepth - 1) / Tile::kDepth,
      [&](int thread, typename Tile::State& state) {
        Tile::template load<Tile::kRows>(thread, a, k, p.k, row0, state.a);
        Tile::template load<Tile::kColumns>(thread, b, k, p.k, column0, state.b);
      },
      [&] { k += Tile::kDepth; }, [](State&) {});
  T damping = T(0);
  if constexpr (kFinish == Finish::divide) {
    damping = static_cast<const T*>(batch.damping)[p.index * batch.damping_stride];
    // Nobody can be told here without waiting for the device: a damping that makes no sense makes NaN.
    if (!(damping >= T(0)) || damping - damping != T(0)) damping = static_cast<T>(NAN);
  }
  block.each([&](int thread, State& state) {
    state.sum = 0;
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t i = row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t j = column0 + Tile::column(thread, c);
        if (i >= p.m || j >= p.n) continue;
        const T value = state.tile.sum[r][c];
        const int64_t at = i * p.n + j, other = i * p.other_row + j * p.other_column;
        if constexpr (kFinish == Finish::divide) {
          const T divided = value / (static_cast<const T*>(p.other)[other] + damping);
          static_cast<T*>(p.c)[at] = divided;
          state.sum += static_cast<double>(divided) * static_cast<double>(value);
        } else if constexpr (kRound) {
          static_cast<Grad*>(p.c)[at] = Narrowed<Grad, T>::of(value);
        } else {
          static_cast<T*>(p.c)[at] = value;
        }
        if constexpr (kFinish == Finish::dot) {
          const T grad = widened<T>(static_cast<const Grad*>(p.other)[other]);
          state.sum += static_cast<double>(value) * static_cast<double>(grad);
        }
      }
    }
  });
  if constexpr (kSum) {
    block.warp_sum([](State& state) -> double& { return state.sum; });
    block.each([&](int thread, State& state) {
      if (thread % 32 == 0) shared.sums[thread / 32] = state.sum;
    });
    block.each([&](int thread, State&) {
      if (thread != 0) return;
      double sum = 0;
      for (int warp = 0; warp < kProductThreads / 32; ++warp) sum += shared.sums[warp];
      batch.partial[number] = sum;
    });
  }
}

struct DotState {
  double sum;
};

// One warp for each layer.
template <class T, class Block>
KRONFAC_DEVICE void product_dot(Block& block, const ProductBatch& batch, T* dots, int32_t number) {
  block.each_warp([&](int thread, DotState& state) {
    state.sum = 0;
    for (int32_t at = batch.first[number] + thread; at < batch.first[number + 1]; at += 32) {
      state.sum += batch.partial[at];
    }
  });
  block.warp_sum([](DotState& state) -> double& { return state.sum; });
  block.each_warp([&](int thread, DotState& state) {
    if (thread == 0) dots[batch.problem[number].index] = static_cast<T>(state.sum);
  });
}

}  // namespace kronfac::cuda
