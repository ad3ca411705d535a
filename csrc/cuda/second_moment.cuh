// Kernel templates of second_moment.h.
#pragma once

#include "cuda/second_moment.h"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

template <class T>
struct SecondMomentTile;
template <>
struct SecondMomentTile<float> {
  using Tile = cuda::Tile<float, kSecondMomentRows, kSecondMomentColumns, 8, 8, 4>;
};
template <>
struct SecondMomentTile<double> {
  using Tile = cuda::Tile<double, kSecondMomentWideRows, kSecondMomentWideColumns, 8, 4, 4>;
};

template <class T>
struct SecondMomentState {
  using Tile = typename SecondMomentTile<T>::Tile;
  typename Tile::State tile;
  T squares[Tile::kThreadRows][Tile::kThreadColumns];
};

template <class In, class T>
KRONFAC_DEVICE Operand<In> second_moment_operand(const SecondMoment& p, bool left, int64_t example) {
  return left ? Operand<In>{static_cast<const In*>(p.g) + example * p.g_example, p.g_position, p.g_feature, p.outputs,
                            false}
              : Operand<In>{static_cast<const In*>(p.x) + example * p.x_example, p.x_position, p.x_feature, p.inputs,
                            p.bias};
}

// One tile of the result over one part of the examples. kSingle: positions is 1.
template <class In, class T, bool kSingle, class Block>
KRONFAC_DEVICE void second_moment_tile(Block& block, typename SecondMomentTile<T>::Tile::Shared& shared,
                                       const SecondMoment& p, int64_t tile_row, int64_t tile_column, int64_t part) {
  using Tile = typename SecondMomentTile<T>::Tile;
  using State = SecondMomentState<T>;
  const int64_t row0 = tile_row * Tile::kRows, column0 = tile_column * Tile::kColumns;
  const int64_t first = p.examples * part / p.parts, last = p.examples * (part + 1) / p.parts;
  block.each([&](int, State& state) {
    Tile::clear(state.tile);
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) state.squares[r][c] = T(0);
    }
  });
  if constexpr (kSingle) {
    // The square of a product is the product of squares: a plain sum over examples.
    Operand<In> g = second_moment_operand<In, T>(p, true, 0), x = second_moment_operand<In, T>(p, false, 0);
    g.k_stride = p.g_example;
    x.k_stride = p.x_example;
    int64_t k = first;
    Tile::run(
        block, shared, g.along_k(), x.along_k(), (last - first + Tile::kDepth - 1) / Tile::kDepth,
        [&](int thread, typename Tile::State& state) {
          Tile::template load<Tile::kRows, Tile::kRowLoads, In, true>(thread, g, k, last, row0, state.a);
          Tile::template load<Tile::kColumns, Tile::kColumnLoads, In, true>(thread, x, k, last, column0, state.b);
        },
        [&] { k += Tile::kDepth; }, [](State&) {});
    block.each([&](int, State& state) {
      KRONFAC_UNROLL
      for (int r = 0; r < Tile::kThreadRows; ++r) {
        KRONFAC_UNROLL
        for (int c = 0; c < Tile::kThreadColumns; ++c) state.squares[r][c] = state.tile.sum[r][c];
      }
    });
  } else {
    const int64_t steps = (p.positions + Tile::kDepth - 1) / Tile::kDepth;  // of an example
    int64_t example = first, k = 0;
    bool complete = false;  // the step that is being added ends an example
    const bool g_along = second_moment_operand<In, T>(p, true, 0).along_k(),
               x_along = second_moment_operand<In, T>(p, false, 0).along_k();
    Tile::run(
        block, shared, g_along, x_along, (last - first) * steps,
        [&](int thread, typename Tile::State& state) {
          Tile::template load<Tile::kRows>(thread, second_moment_operand<In, T>(p, true, example), k, p.positions, row0,
                                           state.a);
          Tile::template load<Tile::kColumns>(thread, second_moment_operand<In, T>(p, false, example), k, p.positions,
                                              column0, state.b);
        },
        [&] {
          k += Tile::kDepth;
          complete = k >= p.positions;
          if (!complete) return;
          k = 0;
          ++example;
        },
        [&](State& state) {
          if (!complete) return;
          KRONFAC_UNROLL
          for (int r = 0; r < Tile::kThreadRows; ++r) {
            KRONFAC_UNROLL
            for (int c = 0; c < Tile::kThreadColumns; ++c) {
              state.squares[r][c] += state.tile.sum[r][c] * state.tile.sum[r][c];
              state.tile.sum[r][c] = T(0);
            }
          }
        });
  }
  const int64_t columns = p.columns();
  const bool direct = p.parts == 1;
  T* target = direct ? static_cast<T*>(p.out) : static_cast<T*>(p.partial) + part * p.outputs * columns;
  const int64_t row_stride = direct ? p.out_row : columns, column_stride = direct ? p.out_column : 1;
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t row = row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t column = column0 + Tile::column(thread, c);
        if (row >= p.outputs || column >= columns) continue;
        T& entry = target[row * row_stride + column * column_stride];
        if (!direct) {
          entry = state.squares[r][c];
        } else {
          const T value = static_cast<T>(p.scale) * state.squares[r][c];
          entry = p.decay == 0 ? value : static_cast<T>(p.decay) * entry + value;
        }
      }
    }
  });
}

// Entry `index` of the result from the sums of all parts, added in order.
template <class T>
KRONFAC_DEVICE void second_moment_entry(const SecondMoment& p, int64_t index) {
  const int64_t columns = p.columns(), size = p.outputs * columns;
  if (index >= size) return;
  const T* partial = static_cast<const T*>(p.partial);
  T sum = 0;
  for (int64_t part = 0; part < p.parts; ++part) sum += partial[part * size + index];
  T& entry = static_cast<T*>(p.out)[index / columns * p.out_row + index % columns * p.out_column];
  const T value = static_cast<T>(p.scale) * sum;
  entry = p.decay == 0 ? value : static_cast<T>(p.decay) * entry + value;
}

}  // namespace kronfac::cuda
