// Products of conv_covariance.h on the units of float32 and float64, and what products on tensor cores share with them.
#pragma once

#include "cuda/conv_covariance.h"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

// Sums of a thread and their totals are at most 32 + 32 registers in float32, so that three blocks of 128 threads fit
// on a multiprocessor.
template <class T, int kSide>
struct ConvTile {
  using Tile = cuda::Tile<T, kSide, kSide, 8, kSide == 64 && sizeof(T) == 4 ? 8 : 4, 4>;
};

template <class T, int kSide>
struct ConvState {
  using Tile = typename ConvTile<T, kSide>::Tile;
  typename Tile::State tile;
  T total[Tile::kThreadRows][Tile::kThreadColumns];
  const T *left, *right;  // this thread's features at position 0; null beyond the last feature
  T feature_sum, feature_total;
};

// Feature f of a group, from the position of its patch on.
KRONFAC_DEVICE int64_t conv_feature(const ConvCovariance& p, int64_t f) {
  const int64_t x = f % p.feature_kernel[2], rest = f / p.feature_kernel[2];
  const int64_t y = rest % p.feature_kernel[1], more = rest / p.feature_kernel[1];
  return more / p.feature_kernel[0] * p.channel + more % p.feature_kernel[0] * p.offset[0] + y * p.offset[1] +
         x * p.offset[2];
}

// Position k of a box.
KRONFAC_DEVICE int64_t conv_position(const ConvCovariance& p, const ConvBox& box, int64_t k) {
  const int64_t x = k % box.extent[2], rest = k / box.extent[2];
  const int64_t y = rest % box.extent[1], more = rest / box.extent[1];
  return more / box.extent[0] * p.image + more % box.extent[0] * p.position[0] + y * p.position[1] + x * p.position[2];
}

// The box that a block of a group belongs to.
KRONFAC_DEVICE int32_t conv_box(const ConvCovariance& p, int32_t block) {
  int32_t low = 0, high = p.boxes;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (p.box[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

// Sums of part `part` of a box, (rows + 1, rows).
template <class T>
KRONFAC_DEVICE T* conv_sums(const ConvCovariance& p, int64_t group, const ConvBox& box, int64_t part) {
  return static_cast<T*>(p.sums) + (group * p.parts + box.first_part + part) * p.unit();
}

// What a block of threads forms: one tile of one box over one part of its positions.
struct ConvPlace {
  const ConvBox* box;
  int64_t group, row0, column0, first;
  int32_t part, length;
  bool feature_sums;
};
KRONFAC_DEVICE ConvPlace conv_place(const ConvCovariance& p, int32_t number, int32_t side) {
  ConvPlace place;
  place.group = number / p.blocks;
  const int32_t in_group = number % p.blocks;
  const ConvBox& box = p.box[conv_box(p, in_group)];
  place.box = &box;
  place.part = (in_group - box.first_block) / box.tiles;
  const int32_t at = (in_group - box.first_block) % box.tiles;
  const int32_t across = static_cast<int32_t>((p.rows + side - 1) / side);
  const LowerTile tile = box.symmetric ? lower_tile(at) : LowerTile{at / across, at % across};
  place.row0 = int64_t{tile.row} * side;
  place.column0 = int64_t{tile.column} * side;
  const int64_t positions = p.images * box.extent[0] * box.extent[1] * box.extent[2];
  place.first = positions * place.part / box.parts;
  place.length = static_cast<int32_t>(positions * (place.part + 1) / box.parts - place.first);
  place.feature_sums = p.bias && box.symmetric && tile.column == 0;
  return place;
}

// Where the positions of two runs of kThreads lie: the next run's are found while the present one's are read.
template <int kThreads>
struct ConvRing {
  static_assert((kThreads & (kThreads - 1)) == 0);
  int64_t position[2 * kThreads];

  KRONFAC_DEVICE int64_t at(int k) const { return position[k & (2 * kThreads - 1)]; }
  // Each thread finds its position of a run.
  KRONFAC_DEVICE void find(const ConvCovariance& p, const ConvPlace& place, int thread, int run) {
    const int k = run * kThreads + thread;
    position[k & (2 * kThreads - 1)] = k < place.length ? conv_position(p, *place.box, place.first + k) : 0;
  }
};

template <class T, int kSide>
struct ConvShared {
  using Tile = typename ConvTile<T, kSide>::Tile;
  typename Tile::Shared tile;
  ConvRing<Tile::kThreads> ring;
};

// Products on the units of float32 and float64. kAligned: features lie side by side at multiples of 16 bytes, and what
// lies beyond the last one up to such a multiple may be read.
template <class T, int kSide, bool kAligned, class Block>
KRONFAC_DEVICE void conv_product(Block& block, ConvShared<T, kSide>& shared, const ConvCovariance& p, int32_t number) {
  using Tile = typename ConvTile<T, kSide>::Tile;
  using State = ConvState<T, kSide>;
  using Run = typename Tile::Run;
  constexpr int kSteps = Tile::kThreads / Tile::kDepth;  // of one run of positions
  constexpr int kFlush = 32;                             // steps whose sums are kept apart: bounds rounding errors
  constexpr int kRun = kAligned ? Tile::kRun : 1, kRowRuns = kSide / kRun;  // features that are loaded at once
  static_assert(Tile::kThreads % kRowRuns == 0 && Tile::kRowLoads % kRun == 0 && kSteps > 1);
  static_assert(Tile::kThreads >= kSide);
  const ConvPlace place = conv_place(p, number, kSide);
  const int steps = (place.length + Tile::kDepth - 1) / Tile::kDepth;

  const auto load = [&](int thread, State& state, int step) {
    KRONFAC_UNROLL
    for (int n = 0; n < Tile::kRowLoads; n += kRun) {
      const int k = step * Tile::kDepth + (n / kRun * Tile::kThreads + thread) / kRowRuns;
      const int64_t position = shared.ring.at(k);
      const bool left = k < place.length && state.left, right = k < place.length && state.right;
      if constexpr (kAligned) {
        const Run none{}, a = left ? *reinterpret_cast<const Run*>(state.left + position) : none,
                          b = right ? *reinterpret_cast<const Run*>(state.right + position) : none;
        KRONFAC_UNROLL
        for (int e = 0; e < kRun; ++e) state.tile.a[n + e] = a.value[e], state.tile.b[n + e] = b.value[e];
      } else {
        state.tile.a[n] = left ? state.left[position] : T(0);
        state.tile.b[n] = right ? state.right[position] : T(0);
      }
    }
  };
  const auto store = [&](int thread, const State& state, int half) {
    if constexpr (kAligned) {
      KRONFAC_UNROLL
      for (int n = 0; n < Tile::kRowLoads; n += kRun) {
        const int at = n / kRun * Tile::kThreads + thread, k = at / kRowRuns, i = at % kRowRuns * kRun;
        Run a, b;
        KRONFAC_UNROLL
        for (int e = 0; e < kRun; ++e) a.value[e] = state.tile.a[n + e], b.value[e] = state.tile.b[n + e];
        *reinterpret_cast<Run*>(&shared.tile.a[half][k][i]) = a;
        *reinterpret_cast<Run*>(&shared.tile.b[half][k][i]) = b;
      }
    } else {
      Tile::template store<kSide>(thread, false, state.tile.a, shared.tile.a[half]);
      Tile::template store<kSide>(thread, false, state.tile.b, shared.tile.b[half]);
    }
  };
  const auto flush = [](State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) state.total[r][c] += state.tile.sum[r][c];
    }
    state.feature_total += state.feature_sum;
    state.feature_sum = T(0);
    Tile::clear(state.tile);
  };

  block.each([&](int thread, State& state) {
    Tile::clear(state.tile);
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) state.total[r][c] = T(0);
    }
    state.feature_sum = state.feature_total = T(0);
    const int64_t i = place.row0 + thread % kRowRuns * kRun, j = place.column0 + thread % kRowRuns * kRun;
    const T* map = static_cast<const T*>(p.map) + place.group * p.group;
    state.left = i < p.rows ? map + place.box->left + conv_feature(p, i) : nullptr;
    state.right = j < p.rows ? map + place.box->right + conv_feature(p, j) : nullptr;
    shared.ring.find(p, place, thread, 0);
  });
  block.each([&](int thread, State& state) {
    load(thread, state, 0);
    store(thread, state, 0);
  });
  int half = 0;
  for (int step = 0; step < steps; ++step, half ^= 1) {
    const bool more = step + 1 < steps;
    block.each([&](int thread, State& state) {
      // The next run's positions, in place of the last one's, which were last read two steps ago.
      if (step % kSteps == 0) shared.ring.find(p, place, thread, step / kSteps + 1);
      if (more) load(thread, state, step + 1);
      Tile::multiply(thread, state.tile, shared.tile, half);
      if (place.feature_sums && thread < kSide) {
        KRONFAC_UNROLL
        for (int k = 0; k < Tile::kDepth; ++k) state.feature_sum += shared.tile.a[half][k][thread];
      }
      if ((step + 1) % kFlush == 0) flush(state);
      if (more) store(thread, state, half ^ 1);
    });
  }
  T* sums = conv_sums<T>(p, place.group, *place.box, place.part);
  block.each([&](int thread, State& state) {
    flush(state);
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t i = place.row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t j = place.column0 + Tile::column(thread, c);
        if (i < p.rows && j < p.rows && !(place.box->symmetric && j > i)) sums[i * p.rows + j] = state.total[r][c];
      }
    }
    if (place.feature_sums && thread < kSide && place.row0 + thread < p.rows) {
      sums[p.rows * p.rows + place.row0 + thread] = state.feature_total;
    }
  });
}

}  // namespace kronfac::cuda
