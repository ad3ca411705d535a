// Kernel templates of blocked_inverse.h.
#pragma once

#include "cuda/blocked_inverse.h"
#include "cuda/damped_inverse.cuh"

namespace kronfac::cuda {

// The block of pivots, thread by thread: rows thread / 16 + 16 r, columns thread % 16 + 16 c.
inline constexpr int kFactorSide = 16, kFactorEach = kMostPivots / kFactorSide;
static_assert(kFactorSide * kFactorSide == kInverseThreads);
struct FactorState {
  double a[kFactorEach][kFactorEach];
};
struct FactorShared {
  double line[kMostPivots];  // the pivot's row before it, the pivot, its column after it
  int bad;
};

// W of a matrix' pivots: one block of threads. Column by column, what is done to the rows below the pivot to clear its
// column is done to the identity too; that takes the place of the columns that are done with.
template <class T, class Block>
KRONFAC_DEVICE void factor_block(Block& block, FactorShared& shared, const BlockedBatch& batch, int32_t number) {
  using State = typename Block::State;
  const BlockedProblem& p = batch.problem[number];
  if (batch.info[p.index] != 0) return;
  const int width = batch.width(p.n);
  const int64_t n = p.n, start = int64_t{batch.step} * batch.pivots;
  const T* x = static_cast<const T*>(p.x) + start * (n + 1);
  T* w = static_cast<T*>(p.w);
  const auto row = [](int thread, int r) { return thread / kFactorSide + kFactorSide * r; };
  const auto column = [](int thread, int c) { return thread % kFactorSide + kFactorSide * c; };
  block.each([&](int thread, State&) {
    if (thread == 0) shared.bad = 0;
  });
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < kFactorEach; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        const int i = row(thread, r), j = column(thread, c);
        const double value = i < width && j <= i ? static_cast<double>(x[i * n + j]) : 0.0;
        state.a[r][c] = value;
        if (!finite(value)) shared.bad = 1;
      }
    }
  });
  int32_t info = shared.bad ? -1 : 0;
  for (int k = 0; info == 0 && k < width; ++k) {
    // Who has a part of the line gives it away: 0 is what the update starts from there.
    block.each([&](int thread, State& state) {
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        if (column(thread, c) != k) continue;
        KRONFAC_UNROLL
        for (int r = 0; r < kFactorEach; ++r) {
          if (row(thread, r) < k) continue;
          shared.line[row(thread, r)] = state.a[r][c];
          state.a[r][c] = 0;
        }
      }
      KRONFAC_UNROLL
      for (int r = 0; r < kFactorEach; ++r) {
        if (row(thread, r) != k) continue;
        KRONFAC_UNROLL
        for (int c = 0; c < kFactorEach; ++c) {
          if (column(thread, c) >= k) continue;
          shared.line[column(thread, c)] = state.a[r][c];
          state.a[r][c] = 0;
        }
      }
    });
    const double pivot = shared.line[k];
    if (!(pivot > 0)) {
      info = k + 1;
      break;
    }
    const double reciprocal = 1 / sqrt(pivot);
    // Entries above the diagonal take part with numbers that nobody reads.
    block.each([&](int thread, State& state) {
      double across[kFactorEach];
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        const int j = column(thread, c);
        across[c] = j == k ? reciprocal : shared.line[j] * reciprocal;
      }
      KRONFAC_UNROLL
      for (int r = 0; r < kFactorEach; ++r) {
        const int i = row(thread, r);
        const double down = i > k ? shared.line[i] * reciprocal : i == k ? -1.0 : 0.0;
        KRONFAC_UNROLL
        for (int c = 0; c < kFactorEach; ++c) state.a[r][c] -= down * across[c];
      }
    });
  }
  block.each([&](int thread, State& state) {
    if (info != 0) return;
    KRONFAC_UNROLL
    for (int r = 0; r < kFactorEach; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        const int i = row(thread, r), j = column(thread, c);
        if (i >= width || j >= width) continue;
        const T rounded = j <= i ? static_cast<T>(state.a[r][c]) : T(0);
        w[i * batch.pivots + j] = rounded;
        if (!finite(rounded)) shared.bad = 1;
      }
    }
  });
  block.each([&](int thread, State&) {
    if (thread == 0 && (info != 0 || shared.bad)) {
      batch.info[p.index] = info > 0 ? static_cast<int32_t>(start) + info : -1;
    }
  });
}

// 64 x 64 entries of U := A_:K, with -1 on the diagonal of K; A_:K := 0, A_K: := 0.
template <class T, class Block>
KRONFAC_DEVICE void gather_block(Block& block, const BlockedBatch& batch, int32_t number) {
  int32_t low = 0, high = batch.count;  // first[low] <= number < first[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (batch.first[middle] <= number ? low : high) = middle;
  }
  const BlockedProblem& p = batch.problem[low];
  if (batch.info[p.index] != 0) return;
  const int32_t local = number - batch.first[low], across = BlockedBatch::cut(batch.pivots, 64);
  const int64_t n = p.n, row0 = local / across * int64_t{64}, start = int64_t{batch.step} * batch.pivots;
  const int32_t width = batch.width(p.n), pivot0 = local % across * 64;
  // Neighbouring threads take neighbours in the matrix' memory: pivots, or, above them, where columns are rows, rows.
  const bool by_rows = row0 < start;
  T* x = static_cast<T*>(p.x);
  T* u = static_cast<T*>(p.u);
  block.each([&](int thread, typename Block::State&) {
    for (int at = thread; at < 64 * 64; at += kInverseThreads) {
      const int64_t i = row0 + (by_rows ? at % 64 : at / 64);
      const int32_t k = pivot0 + (by_rows ? at / 64 : at % 64);
      if (i >= n || k >= width) continue;
      const int64_t pivot = start + k;
      T& entry = i < pivot ? x[pivot * n + i] : x[i * n + pivot];
      const bool beside = i < start || i >= start + width;
      u[i * batch.pivots + k] = beside ? entry : i == pivot ? T(-1) : T(0);
      if (beside || i >= pivot) entry = T(0);
    }
  });
}

// The addresses that add_products() counts on, of one matrix.
template <class T, class Block>
KRONFAC_DEVICE void addresses_of(Block& block, const BlockedBatch& batch, int32_t number) {
  const BlockedProblem& p = batch.problem[number];
  const int32_t members = p.members, tiles = batch.tiles(p.n), whole = batch.whole(p.n), flat = batch.flat(p.n);
  const int64_t total = int64_t{members} * tiles, side = batch.tile;
  T* x = static_cast<T*>(p.x);
  T* y = static_cast<T*>(p.y);
  block.each([&](int thread, typename Block::State&) {
    if (thread == 0) {
      p.addresses[p.member] = p.w;
      p.addresses[members + p.member] = p.u;
      p.addresses[2 * members + p.member] = y;
    }
    void** const target = p.addresses + 3 * members;
    for (int32_t local = thread; local < tiles; local += kInverseThreads) {
      const LowerTile tile = lower_tile(local);
      int64_t at = int64_t{p.member} * whole + local;
      if (local >= whole) at = int64_t{members} * whole + int64_t{p.member} * flat + (local - whole);
      if (local >= whole + flat) at = int64_t{members} * (whole + flat) + p.member;
      target[at] = y + tile.column * side * batch.pivots;
      target[total + at] = y + tile.row * side * batch.pivots;
      target[2 * total + at] = x + tile.row * side * p.n + tile.column * side;
    }
  });
}

}  // namespace kronfac::cuda
