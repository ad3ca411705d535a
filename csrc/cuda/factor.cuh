// The inverse W of the Cholesky factor of a block of pivots, in double in the registers of one block of threads.
//
// Sweeps that go on with W (Y = U W^T, A - Y Y^T) lose as many digits as Cholesky does. Going on with D^-1 = W^T W
// would lose twice as many: what it rounds is as large as the condition of the block, not its root.
#pragma once

#include <cmath>

#include "cuda/block.cuh"

namespace kronfac::cuda {

inline constexpr int kFactorThreads = 256, kFactorSide = 16;
inline constexpr int kFactorOrder = 64, kFactorEach = kFactorOrder / kFactorSide;

// Rows thread / 16 + 16 r, columns thread % 16 + 16 c.
struct FactorState {
  double a[kFactorEach][kFactorEach];
};
struct FactorShared {
  double line[kFactorOrder];  // the pivot's row before it, the pivot, its column after it
  int bad;
};

KRONFAC_DEVICE int factor_row(int thread, int r) { return thread / kFactorSide + kFactorSide * r; }
KRONFAC_DEVICE int factor_column(int thread, int c) { return thread % kFactorSide + kFactorSide * c; }

// Of the matrix of order n <= kFactorOrder whose lower triangle load(i, j) gives; store(i, j, value) takes W, zeros
// above its diagonal too, and says whether it can hold the value. Returns 0, or the order of the first leading minor
// that is not positive, or -1 where an entry of either is not finite; store has then been called only in the last case.
//
// Column by column, what is done to the rows below the pivot to clear its column is done to the identity too; that
// takes the place of the columns that are done with.
template <class Block, class Load, class Store>
KRONFAC_DEVICE int32_t factor(Block& block, FactorShared& shared, int n, const Load& load, const Store& store) {
  using State = typename Block::State;
  block.each([&](int thread, State&) {
    if (thread == 0) shared.bad = 0;
  });
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < kFactorEach; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        const int i = factor_row(thread, r), j = factor_column(thread, c);
        const double value = i < n && j <= i ? load(i, j) : 0.0;
        state.a[r][c] = value;
        if (value - value != 0) shared.bad = 1;
      }
    }
  });
  if (shared.bad) return -1;
  for (int k = 0; k < n; ++k) {
    // Who has a part of the line gives it away: 0 is what the update starts from there.
    block.each([&](int thread, State& state) {
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        if (factor_column(thread, c) != k) continue;
        KRONFAC_UNROLL
        for (int r = 0; r < kFactorEach; ++r) {
          if (factor_row(thread, r) < k) continue;
          shared.line[factor_row(thread, r)] = state.a[r][c];
          state.a[r][c] = 0;
        }
      }
      KRONFAC_UNROLL
      for (int r = 0; r < kFactorEach; ++r) {
        if (factor_row(thread, r) != k) continue;
        KRONFAC_UNROLL
        for (int c = 0; c < kFactorEach; ++c) {
          if (factor_column(thread, c) >= k) continue;
          shared.line[factor_column(thread, c)] = state.a[r][c];
          state.a[r][c] = 0;
        }
      }
    });
    const double pivot = shared.line[k];
    if (!(pivot > 0)) return k + 1;
    const double reciprocal = 1 / sqrt(pivot);
    // Entries above the diagonal take part with numbers that nobody reads.
    block.each([&](int thread, State& state) {
      double across[kFactorEach];
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        const int j = factor_column(thread, c);
        across[c] = j == k ? reciprocal : shared.line[j] * reciprocal;
      }
      KRONFAC_UNROLL
      for (int r = 0; r < kFactorEach; ++r) {
        const int i = factor_row(thread, r);
        const double down = i > k ? shared.line[i] * reciprocal : i == k ? -1.0 : 0.0;
        KRONFAC_UNROLL
        for (int c = 0; c < kFactorEach; ++c) state.a[r][c] -= down * across[c];
      }
    });
  }
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < kFactorEach; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < kFactorEach; ++c) {
        const int i = factor_row(thread, r), j = factor_column(thread, c);
        if (i < n && j < n && !store(i, j, j <= i ? state.a[r][c] : 0.0)) shared.bad = 1;
      }
    }
  });
  return shared.bad ? -1 : 0;
}

}  // namespace kronfac::cuda
