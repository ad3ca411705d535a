// Products of conv_covariance.h on tensor cores: bfloat16 and float16 as they are, float32 rounded to TF32.
#pragma once

#include "cuda/conv_covariance.cuh"
#include "cuda/mma_tile.cuh"

namespace kronfac::cuda {

template <class In, int kSide>
struct ConvMmaState {
  using Tile = MmaTile<In, kSide>;
  static constexpr bool kTotals = kSide <= 64;  // larger tiles have no registers left: their parts are short
  typename Tile::State tile;
  float total[kTotals ? Tile::kRowTiles : 1][kTotals ? Tile::kColumnTiles : 1][4];
  float feature_sum;
  int steps;
};

template <class In, int kSide>
struct ConvMmaShared {
  using Tile = MmaTile<In, kSide>;
  typename Tile::Shared tile;
  ConvRing<Tile::kThreads> ring;
  int64_t feature[2][kSide];  // of rows and columns: where they lie from position 0 of the group, -1: nowhere
};

// kAligned: features lie side by side at multiples of 16 bytes.
template <class In, int kSide, bool kAligned, class Block>
KRONFAC_DEVICE void conv_mma_product(Block& block, ConvMmaShared<In, kSide>& shared, const ConvCovariance& p,
                                     int32_t number) {
  using State = ConvMmaState<In, kSide>;
  using Tile = typename State::Tile;
  using Entries = typename Tile::Entries;
  constexpr int kRunSteps = Tile::kThreads / Tile::kDepth;  // of one run of positions
  constexpr int kAhead = Tile::kStages - 1;                 // steps that are on their way
  constexpr int kFlush = 256 / Tile::kDepth;
  constexpr int kAcross = kSide / Tile::kRun, kRows = Tile::kThreads / kAcross;
  static_assert(kAhead < kRunSteps && kSide <= Tile::kThreads);
  const ConvPlace place = conv_place(p, number, kSide);
  const bool same = place.box->symmetric && place.row0 == place.column0;
  const int steps = (place.length + Tile::kDepth - 1) / Tile::kDepth;
  const In* map = static_cast<const In*>(p.map) + place.group * p.group;

  // Runs of kRun features.
  const auto copy = [&](int thread, int operand, int step, Entries& target) {
    const int column = thread % kAcross * Tile::kRun;
    const int64_t feature = shared.feature[operand][column],
                  left = p.rows - column - (operand == 0 ? place.row0 : place.column0);
    const int bytes = left <= 0 ? 0 : left < Tile::kRun ? static_cast<int>(left) * static_cast<int>(sizeof(In)) : 16;
    KRONFAC_UNROLL
    for (int n = 0; n < Tile::kDepth / kRows; ++n) {
      const int row = n * kRows + thread / kAcross, k = step * Tile::kDepth + row;
      const bool there = bytes > 0 && k < place.length;
      block.copy_async(&target.at[row][column], there ? map + shared.ring.at(k) + feature : map, there ? bytes : 0);
    }
  };
  // One feature after another.
  const auto gather = [&](int thread, int operand, int step, Entries& target) {
    constexpr int kStep = Tile::kThreads / kSide, kAtOnce = 8;
    const int64_t feature = shared.feature[operand][thread % kSide];
    for (int first = thread / kSide; first < Tile::kDepth; first += kAtOnce * kStep) {
      In entries[kAtOnce];
      KRONFAC_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int k = step * Tile::kDepth + first + n * kStep;
        entries[n] = k < place.length && feature >= 0 ? map[shared.ring.at(k) + feature] : In{};
      }
      KRONFAC_UNROLL
      for (int n = 0; n < kAtOnce; ++n) target.at[first + n * kStep][thread % kSide] = entries[n];
    }
  };
  const auto load = [&](int thread, int64_t number_of_step, typename Tile::Stage& stage) {
    const int step = static_cast<int>(number_of_step);
    // The next run's positions, in place of the last one's: all of those have been used before the latest barrier, and
    // none of these is before the next one.
    if (step % kRunSteps == kAhead) shared.ring.find(p, place, thread, step / kRunSteps + 1);
    if constexpr (kAligned) {
      copy(thread, 0, step, stage.a);
      if (!same) copy(thread, 1, step, stage.b);
    } else {
      gather(thread, 0, step, stage.a);
      if (!same) gather(thread, 1, step, stage.b);
    }
  };
  const auto flush = [](State& state) {
    if constexpr (State::kTotals) {
      KRONFAC_UNROLL
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        KRONFAC_UNROLL
        for (int n = 0; n < Tile::kColumnTiles; ++n) {
          KRONFAC_UNROLL
          for (int r = 0; r < 4; ++r) state.total[m][n][r] += state.tile.sum[m][n][r];
        }
      }
      Tile::clear(state.tile);
    }
  };

  block.each([&](int thread, State& state) {
    Tile::clear(state.tile);
    if constexpr (State::kTotals) {
      KRONFAC_UNROLL
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        KRONFAC_UNROLL
        for (int n = 0; n < Tile::kColumnTiles; ++n) {
          KRONFAC_UNROLL
          for (int r = 0; r < 4; ++r) state.total[m][n][r] = 0;
        }
      }
    }
    state.feature_sum = 0;
    state.steps = 0;
    for (int at = thread; at < 2 * kSide; at += Tile::kThreads) {
      const bool row = at < kSide;
      const int64_t i = (row ? place.row0 : place.column0) + at % kSide;
      shared.feature[row ? 0 : 1][at % kSide] =
          i < p.rows ? (row ? place.box->left : place.box->right) + conv_feature(p, i) : -1;
    }
    shared.ring.find(p, place, thread, 0);
  });
  Tile::run(block, shared.tile, same, steps, load, [&](int thread, State& state, const Entries& a) {
    if (place.feature_sums && thread < kSide) {
      float sum = 0;
      KRONFAC_UNROLL
      for (int k = 0; k < Tile::kDepth; ++k) sum += widened<float>(a.at[k][thread]);
      state.feature_sum += sum;
    }
    if (State::kTotals && ++state.steps % kFlush == 0) flush(state);
  });
  float* sums = conv_sums<float>(p, place.group, *place.box, place.part);
  block.each([&](int thread, State& state) {
    flush(state);
    KRONFAC_UNROLL
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      KRONFAC_UNROLL
      for (int n = 0; n < Tile::kColumnTiles; ++n) {
        KRONFAC_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int64_t i = place.row0 + Tile::row(thread, m, r), j = place.column0 + Tile::column(thread, n, r);
          if (i >= p.rows || j >= p.rows || (place.box->symmetric && j > i)) continue;
          if constexpr (State::kTotals) {
            sums[i * p.rows + j] = state.total[m][n][r];
          } else {
            sums[i * p.rows + j] = state.tile.sum[m][n][r];
          }
        }
      }
    }
    if (place.feature_sums && thread < kSide && place.row0 + thread < p.rows) {
      sums[p.rows * p.rows + place.row0 + thread] = state.feature_sum;
    }
  });
}

}  // namespace kronfac::cuda
