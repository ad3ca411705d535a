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

// The layer of a batch that a block of threads works at, and the block's number there.
struct ProductTask {
  const Product& problem;
  int32_t number;
};
KRONFAC_DEVICE ProductTask product_task(const ProductBatch& batch, int32_t block) {
  const int32_t at = problem_of(batch, block);
  return {batch.problem[at], block - batch.first[at]};
}

template <Finish kFinish>
inline constexpr bool kRounds = kFinish == Finish::dot || kFinish == Finish::rounded;
template <Finish kFinish>
inline constexpr bool kHasSum = kFinish == Finish::dot || kFinish == Finish::divide;

template <Finish kFinish, class T>
KRONFAC_DEVICE T product_damping(const ProductBatch& batch, const Product& p) {
  if constexpr (kFinish == Finish::divide) {
    const T damping = static_cast<const T*>(batch.damping)[p.index * batch.damping_stride];
    // Nobody can be told here without waiting for the device: a damping that makes no sense makes NaN.
    return damping >= T(0) && damping - damping == T(0) ? damping : static_cast<T>(NAN);
  } else {
    return T(0);
  }
}

// What becomes of C(i, j) = value. Grad: the type of what is rounded, and of other in `dot`.
template <Finish kFinish, class Grad, class T>
KRONFAC_DEVICE void finish_entry(const Product& p, T damping, int64_t i, int64_t j, T value, double& sum) {
  const int64_t at = i * p.n + j, other = i * p.other_row + j * p.other_column;
  if constexpr (kFinish == Finish::divide) {
    const T divided = value / (static_cast<const T*>(p.other)[other] + damping);
    static_cast<T*>(p.c)[at] = divided;
    sum += static_cast<double>(divided) * static_cast<double>(value);
  } else if constexpr (kRounds<kFinish>) {
    if (p.c != nullptr) static_cast<Grad*>(p.c)[at] = Narrowed<Grad, T>::of(value);
  } else {
    static_cast<T*>(p.c)[at] = value;
  }
  if constexpr (kFinish == Finish::dot) {
    const T grad = widened<T>(static_cast<const Grad*>(p.other)[other]);
    sum += static_cast<double>(value) * static_cast<double>(grad);
  }
}

// The sum over a block of threads, in a fixed order, to its place.
template <class Block>
KRONFAC_DEVICE void finish_sum(Block& block, double* sums, double* place) {
  using State = typename Block::State;
  block.warp_sum([](State& state) -> double& { return state.sum; });
  block.each([&](int thread, State& state) {
    if (thread % 32 == 0) sums[thread / 32] = state.sum;
  });
  block.each([&](int thread, State&) {
    if (thread != 0) return;
    double sum = 0;
    for (int warp = 0; warp < kProductThreads / 32; ++warp) sum += sums[warp];
    *place = sum;
  });
}

// B: the type of b.
template <Finish kFinish, class B, class Grad, class T, class Block>
KRONFAC_DEVICE void product_tile(Block& block, ProductShared<T>& shared, const ProductBatch& batch, int32_t number) {
  using Tile = typename ProductTile<T>::Tile;
  using State = ProductState<T>;
  const ProductTask task = product_task(batch, number);
  const Product& p = task.problem;
  const int32_t across = (p.n + kProductColumns - 1) / kProductColumns;
  const int64_t row0 = task.number / across * int64_t{Tile::kRows};
  const int64_t column0 = task.number % across * int64_t{kProductColumns};
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
  const T damping = product_damping<kFinish, T>(batch, p);
  block.each([&](int thread, State& state) {
    state.sum = 0;
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t i = row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t j = column0 + Tile::column(thread, c);
        if (i < p.m && j < p.n) finish_entry<kFinish, Grad, T>(p, damping, i, j, state.tile.sum[r][c], state.sum);
      }
    }
  });
  if constexpr (kHasSum<kFinish>) finish_sum(block, shared.sums, &batch.partial[number]);
}

// C is there already, in a: 64 x 64 entries of it. A: the type of a.
template <Finish kFinish, class A, class Grad, class T, class Block>
KRONFAC_DEVICE void finish_tile(Block& block, double* sums_of_warps, const ProductBatch& batch, int32_t number) {
  using State = typename Block::State;
  constexpr int kSide = 64, kEntries = kSide * kSide / kProductThreads;
  static_assert(kSide == product_rows(true) && kSide == kProductColumns);
  const ProductTask task = product_task(batch, number);
  const Product& p = task.problem;
  const int32_t across = (p.n + kSide - 1) / kSide;
  const int64_t row0 = task.number / across * int64_t{kSide}, column0 = task.number % across * int64_t{kSide};
  const T damping = product_damping<kFinish, T>(batch, p);
  block.each([&](int thread, State& state) {
    state.sum = 0;
    KRONFAC_UNROLL
    for (int e = 0; e < kEntries; ++e) {
      const int at = e * kProductThreads + thread;
      const int64_t i = row0 + at / kSide, j = column0 + at % kSide;
      if (i >= p.m || j >= p.n) continue;
      const T value = widened<T>(static_cast<const A*>(p.a)[i * p.a_row + j * p.a_k]);
      finish_entry<kFinish, Grad, T>(p, damping, i, j, value, state.sum);
    }
  });
  if constexpr (kHasSum<kFinish>) finish_sum(block, sums_of_warps, &batch.partial[number]);
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
