// Kernel templates of covariance.h and covariance_plan.h.
#pragma once

#include "cuda/covariance_plan.h"
#include "cuda/mma_tile.cuh"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

template <class T>
struct CovarianceTile;
template <>
struct CovarianceTile<float> {
  using Tile = cuda::Tile<float, covariance_side(false), covariance_side(false), 8, 8, 8>;
};
template <>
struct CovarianceTile<double> {
  using Tile = cuda::Tile<double, covariance_side(true), covariance_side(true), 8, 4, 4>;
};
constexpr int kCovarianceThreads = 256;
static_assert(CovarianceTile<float>::Tile::kThreads == kCovarianceThreads);
static_assert(CovarianceTile<double>::Tile::kThreads == kCovarianceThreads);
template <class T>
struct CovarianceState {
  typename CovarianceTile<T>::Tile::State tile;
};

template <class T>
KRONFAC_DEVICE T& covariance_at(const Covariance& p, int64_t i, int64_t j) {
  return static_cast<T*>(p.out)[i * p.out_row + j * p.out_column];
}

// What becomes of entry (i, j) of the lower triangle and of its mirror image. The old value is that of the lower
// triangle for both: the result is symmetric to the last bit.
template <class T>
KRONFAC_DEVICE T covariance_value(const Covariance& p, int64_t i, int64_t j, T sum) {
  const T value = static_cast<T>(p.scale) * sum;
  return p.decay == 0 ? value : static_cast<T>(p.decay) * covariance_at<T>(p, i, j) + value;
}

// A tile's sum of entry (i, j) of the lower triangle: to the other parts, or into the result.
template <class T>
KRONFAC_DEVICE void covariance_put(const Covariance& p, int64_t part, int64_t i, int64_t j, T sum) {
  if (p.parts > 1) {
    static_cast<T*>(p.partial)[(part * p.d() + i) * p.d() + j] = sum;
    return;
  }
  const T result = covariance_value<T>(p, i, j, sum);
  covariance_at<T>(p, i, j) = result;
  covariance_at<T>(p, j, i) = result;
}

// One tile of the lower triangle, numbered row by row, over one part of the rows of x.
template <class T, class Block>
KRONFAC_DEVICE void covariance_tile(Block& block, typename CovarianceTile<T>::Tile::Shared& shared, const Covariance& p,
                                    int64_t number, int64_t part) {
  using Tile = typename CovarianceTile<T>::Tile;
  using State = CovarianceState<T>;
  const LowerTile tile = lower_tile(static_cast<int32_t>(number));
  const int64_t row0 = int64_t{tile.row} * Tile::kRows, column0 = int64_t{tile.column} * Tile::kColumns;
  const int64_t first = p.m * part / p.parts, last = p.m * (part + 1) / p.parts, d = p.d();
  const Operand<T> x{static_cast<const T*>(p.x), p.row, p.feature, p.features, p.bias};
  block.each([&](int, State& state) { Tile::clear(state.tile); });
  int64_t k = first;
  Tile::run(
      block, shared, x.along_k(), x.along_k(), (last - first + Tile::kDepth - 1) / Tile::kDepth,
      [&](int thread, typename Tile::State& state) {
        Tile::template load<Tile::kRows>(thread, x, k, last, row0, state.a);
        Tile::template load<Tile::kColumns>(thread, x, k, last, column0, state.b);
      },
      [&] { k += Tile::kDepth; }, [](State&) {});
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t i = row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t j = column0 + Tile::column(thread, c);
        if (i < d && j <= i) covariance_put<T>(p, part, i, j, state.tile.sum[r][c]);
      }
    }
  });
}

template <class In>
struct CovarianceMmaShared {
  typename MmaTile<In>::Shared tile;
  float ones[4][kMmaSide];  // column sums of each warp
};
template <class In>
struct CovarianceMmaState {
  typename MmaTile<In>::State tile;
  float ones[4];  // of columns 4 lane, ... over a quarter of the rows
};

// The same on tensor cores. kCopied: x is as MmaTile::copy wants it. Diagonal tiles load one operand only.
template <class In, bool kCopied, class Block>
KRONFAC_DEVICE void covariance_mma_tile(Block& block, CovarianceMmaShared<In>& shared, const Covariance& p,
                                        int64_t number, int64_t part) {
  using Tile = MmaTile<In>;
  using State = CovarianceMmaState<In>;
  static_assert(Tile::kSide == kMmaSide && Tile::kThreads == kMmaSide);
  struct alignas(4 * sizeof(In)) Four {
    In entry[4];
  };
  const LowerTile tile = lower_tile(static_cast<int32_t>(number));
  const int64_t row0 = int64_t{tile.row} * kMmaSide, column0 = int64_t{tile.column} * kMmaSide;
  const int64_t first = p.m * part / p.parts, last = p.m * (part + 1) / p.parts;
  const Operand<In> x{static_cast<const In*>(p.x), p.row, p.feature, p.features, false};
  const bool diagonal = tile.row == tile.column, ones = diagonal && p.bias;
  const int64_t steps = p.features == 0 ? 0 : (last - first + Tile::kDepth - 1) / Tile::kDepth;
  block.each_warp([&](int, State& state) {
    Tile::clear(state.tile);
    KRONFAC_UNROLL
    for (int e = 0; e < 4; ++e) state.ones[e] = 0;
  });
  Tile::run(
      block, shared.tile, diagonal, steps,
      [&](int thread, int64_t step, typename Tile::Stage& stage) {
        const int64_t k = first + step * Tile::kDepth;
        if constexpr (kCopied) {
          Tile::copy(block, thread, x, k, last, row0, stage.a);
          if (!diagonal) Tile::copy(block, thread, x, k, last, column0, stage.b);
        } else {
          Tile::gather(thread, x, k, last, row0, stage.a);
          if (!diagonal) Tile::gather(thread, x, k, last, column0, stage.b);
        }
      },
      [&](int thread, State& state, const typename Tile::Entries& entries) {
        if (!ones) return;
        constexpr int kRows = Tile::kDepth / 4;  // of a warp
        KRONFAC_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const Four four = *reinterpret_cast<const Four*>(&entries.at[thread / 32 * kRows + k][thread % 32 * 4]);
          KRONFAC_UNROLL
          for (int e = 0; e < 4; ++e) state.ones[e] += widened<float>(four.entry[e]);
        }
      });
  block.each_warp([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      KRONFAC_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int64_t i = row0 + Tile::row(thread, m, r);
        KRONFAC_UNROLL
        for (int n = 0; n < Tile::kColumnTiles; ++n) {
          const int64_t j = column0 + Tile::column(thread, n, r);
          if (i < p.features && j <= i) covariance_put<float>(p, part, i, j, state.tile.sum[m][n][r]);
        }
      }
    }
  });
  if (!ones) return;
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int e = 0; e < 4; ++e) shared.ones[thread / 32][thread % 32 * 4 + e] = state.ones[e];
  });
  block.each_warp([&](int thread, State&) {
    const int64_t j = column0 + thread;
    float sum = 0;
    for (int warp = 0; warp < 4; ++warp) sum += shared.ones[warp][thread];
    if (j < p.features) covariance_put<float>(p, part, p.features, j, sum);
    if (j == 0) covariance_put<float>(p, part, p.features, p.features, static_cast<float>(last - first));
  });
}

// --- sums of parts
// ------------------------------------------------------------------------------------------------------

struct SumState {};

constexpr int kSumThreads = 256, kSumSide = 32;
template <class T>
struct SumShared {
  T at[kSumSide][kSumSide + 1];
};

// Adds `parts` numbers that lie `step` apart, in order.
template <class T>
KRONFAC_DEVICE T sum_of_parts(const T* from, int64_t parts, int64_t step) {
  T sum = 0;
  KRONFAC_UNROLL_BY(8)
  for (int64_t part = 0; part < parts; ++part) sum += from[part * step];
  return sum;
}

// Entry (i, j) of the result from the parts that tiles leave behind.
template <class T>
KRONFAC_DEVICE T covariance_from_parts(const Covariance& p, int64_t i, int64_t j) {
  const T* first = static_cast<const T*>(p.partial) + i * p.d() + j;
  return covariance_value<T>(p, i, j, sum_of_parts<T>(first, p.parts, p.d() * p.d()));
}

// The same from panels.
template <class T>
KRONFAC_DEVICE T covariance_from_panels(const Covariance& p, const CovariancePanels& panels, int64_t i, int64_t j) {
  const T* partial = static_cast<const T*>(p.partial);
  if (i == p.features) {
    const T sum =
        j == i ? static_cast<T>(p.m) : sum_of_parts<T>(partial + panels.sums + j, panels.sum_parts, p.features);
    return covariance_value<T>(p, i, j, sum);
  }
  const int64_t number = i / panels.width;
  const CovariancePanels::Panel& panel = panels.panel[number];
  if (panel.parts == 0) return covariance_at<T>(p, i, j);
  const T* first = partial + panel.first + (i - panels.begin(number)) * panel.leading + j;
  return covariance_value<T>(p, i, j, sum_of_parts<T>(first, panel.parts, panels.part_size(number)));
}

// One tile of the lower triangle and its mirror image; value(i, j) is what becomes of an entry of the former.
template <class T, class Block, class Value>
KRONFAC_DEVICE void covariance_sum_tile(Block& block, SumShared<T>& shared, const Covariance& p, int64_t number,
                                        const Value& value) {
  constexpr int kRows = kSumThreads / kSumSide;
  const LowerTile tile = lower_tile(static_cast<int32_t>(number));
  const int64_t row0 = int64_t{tile.row} * kSumSide, column0 = int64_t{tile.column} * kSumSide;
  block.each([&](int thread, SumState&) {
    const int column = thread % kSumSide;
    KRONFAC_UNROLL
    for (int n = 0; n < kSumSide / kRows; ++n) {
      const int row = n * kRows + thread / kSumSide;
      const int64_t i = row0 + row, j = column0 + column;
      if (i >= p.d() || j > i) continue;
      const T result = value(i, j);
      covariance_at<T>(p, i, j) = result;
      shared.at[row][column] = result;
    }
  });
  block.each([&](int thread, SumState&) {
    const int row = thread % kSumSide;
    KRONFAC_UNROLL
    for (int n = 0; n < kSumSide / kRows; ++n) {
      const int column = n * kRows + thread / kSumSide;
      const int64_t i = row0 + row, j = column0 + column;
      if (i < p.d() && j < i) covariance_at<T>(p, j, i) = shared.at[row][column];
    }
  });
}

// Sums of 32 columns of x over one part of its rows, for the panels.
template <class In, class T, class Block>
KRONFAC_DEVICE void covariance_column_sums(Block& block, SumShared<T>& shared, const Covariance& p,
                                           const CovariancePanels& panels, int64_t number, int64_t part) {
  constexpr int kGroups = kSumThreads / kSumSide;
  const Operand<In> x{static_cast<const In*>(p.x), p.row, p.feature, p.features, false};
  const int64_t column0 = number * kSumSide, first = p.m * part / panels.sum_parts,
                last = p.m * (part + 1) / panels.sum_parts;
  const bool along_k = x.along_k();
  // Neighbouring threads take neighbours in memory: columns, or else rows.
  block.each([&](int thread, SumState&) {
    const int lane = thread % kSumSide, group = thread / kSumSide;
    const auto sum = [&](int column, int64_t from, int64_t step) {
      T total = 0;
      if (column0 + column < p.features) {
        KRONFAC_UNROLL_BY(8)
        for (int64_t k = first + from; k < last; k += step) total += x.template at<T>(k, column0 + column);
      }
      return total;
    };
    if (along_k) {
      for (int column = group; column < kSumSide; column += kGroups)
        shared.at[column][lane] = sum(column, lane, kSumSide);
    } else {
      shared.at[lane][group] = sum(lane, group, kGroups);
    }
  });
  block.each([&](int thread, SumState&) {
    if (thread >= kSumSide || column0 + thread >= p.features) return;
    T total = 0;
    for (int i = 0; i < (along_k ? kSumSide : kGroups); ++i) total += shared.at[thread][i];
    static_cast<T*>(p.partial)[panels.sums + part * p.features + column0 + thread] = total;
  });
}

}  // namespace kronfac::cuda
