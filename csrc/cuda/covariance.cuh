// Kernel templates of covariance.h.
#pragma once

#include "cuda/covariance.h"
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
template <class T>
struct CovarianceState {
  typename CovarianceTile<T>::Tile::State tile;
};

// Entry (i, j) of the lower triangle and its mirror image. The old value is that of the lower triangle for both: the
// result is symmetric to the last bit.
template <class T>
KRONFAC_DEVICE void covariance_write(const Covariance& p, int64_t i, int64_t j, T sum) {
  T* out = static_cast<T*>(p.out);
  T& entry = out[i * p.out_row + j * p.out_column];
  const T value = static_cast<T>(p.scale) * sum;
  const T result = p.decay == 0 ? value : static_cast<T>(p.decay) * entry + value;
  entry = result;
  out[j * p.out_row + i * p.out_column] = result;
}

// One tile of the lower triangle, numbered row by row, over one part of the rows of x.
template <class In, class T, class Block>
KRONFAC_DEVICE void covariance_tile(Block& block, typename CovarianceTile<T>::Tile::Shared& shared, const Covariance& p,
                                    int64_t number, int64_t part) {
  using Tile = typename CovarianceTile<T>::Tile;
  using State = CovarianceState<T>;
  const LowerTile tile = lower_tile(static_cast<int32_t>(number));
  const int64_t row0 = int64_t{tile.row} * Tile::kRows, column0 = int64_t{tile.column} * Tile::kColumns;
  const int64_t first = p.m * part / p.parts, last = p.m * (part + 1) / p.parts, d = p.d();
  const Operand<In> x{static_cast<const In*>(p.x), p.row, p.feature, p.features, p.bias};
  block.each([&](int, State& state) { Tile::clear(state.tile); });
  int64_t k = first;
  Tile::run(
      block, shared, x.along_k(), x.along_k(), (last - first + Tile::kDepth - 1) / Tile::kDepth,
      [&](int thread, typename Tile::State& state) {
        Tile::template load<Tile::kRows>(thread, x, k, last, row0, state.a);
        Tile::template load<Tile::kColumns>(thread, x, k, last, column0, state.b);
      },
      [&] { k += Tile::kDepth; }, [](State&) {});
  T* partial = p.parts == 1 ? nullptr : static_cast<T*>(p.partial) + part * d * d;
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t i = row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t j = column0 + Tile::column(thread, c);
        if (i >= d || j > i) continue;
        if (partial) {
          partial[i * d + j] = state.tile.sum[r][c];
        } else {
          covariance_write<T>(p, i, j, state.tile.sum[r][c]);
        }
      }
    }
  });
}

// Entry `index` of (d, d) and its mirror image, from the sums of all parts, added in order.
template <class T>
KRONFAC_DEVICE void covariance_entry(const Covariance& p, int64_t index) {
  const int64_t d = p.d(), i = index / d, j = index % d;
  if (i >= d || j > i) return;
  const T* partial = static_cast<const T*>(p.partial);
  T sum = 0;
  for (int64_t part = 0; part < p.parts; ++part) sum += partial[part * d * d + index];
  covariance_write<T>(p, i, j, sum);
}

}  // namespace kronfac::cuda
