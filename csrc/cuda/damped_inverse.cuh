// Kernel templates of damped_inverse.h.
#pragma once

#include <cmath>

#include "cuda/damped_inverse.h"
#include "cuda/factor.cuh"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

template <class T>
using InverseTile = Tile<T, kPivots, kPivots, 8, 4, 4>;
template <class T>
struct InverseState {
  typename InverseTile<T>::State tile;
};

template <class T>
KRONFAC_DEVICE bool finite(T x) {
  return x - x == T(0);
}

// The matrix of a batch that a block of threads works at, and the block's number there.
struct InverseTask {
  const InverseProblem& problem;
  int32_t number;
};
KRONFAC_DEVICE InverseTask inverse_task(const InverseBatch& batch, int32_t block) {
  const int32_t at = problem_of(batch, block);
  return {batch.problem[at], block - batch.first[at]};
}

// The lower triangle by rows, and the column that is swept with.
struct SweepShared {
  double* a;       // (n (n + 1) / 2)
  double* column;  // (n)
  int* bad;        // 1
  KRONFAC_DEVICE double& at(int i, int j) const { return a[i * (i + 1) / 2 + j]; }
};
constexpr int64_t sweep_bytes(int64_t n) { return (n * (n + 1) / 2 + n + 1) * static_cast<int64_t>(sizeof(double)); }
KRONFAC_DEVICE SweepShared sweep_shared(double* memory, int n) {
  double* const column = memory + n * (n + 1) / 2;
  return {memory, column, reinterpret_cast<int*>(column + n)};
}

// The inverse of the matrix of order n whose lower triangle load(i, j) gives; store(i, j, value) takes its lower
// triangle. Returns 0, or the order of the first leading minor that is not positive, or -1 where an entry of either is
// not finite; store has then been called only in the last case.
template <class Block, class Load, class Store>
KRONFAC_DEVICE int32_t sweep_small(Block& block, const SweepShared& shared, int n, const Load& load,
                                   const Store& store) {
  using State = typename Block::State;
  constexpr int kSide = 16;
  static_assert(kSide * kSide == kInverseThreads);
  block.each([&](int thread, State&) {
    if (thread == 0) *shared.bad = 0;
  });
  block.each([&](int thread, State&) {
    for (int i = thread / kSide; i < n; i += kSide) {
      for (int j = thread % kSide; j <= i; j += kSide) {
        const double value = load(i, j);
        shared.at(i, j) = value;
        if (!finite(value)) *shared.bad = 1;
      }
    }
  });
  if (*shared.bad) return -1;
  for (int k = 0; k < n; ++k) {
    const double pivot = shared.at(k, k);
    if (!(pivot > 0)) return k + 1;
    const double reciprocal = 1 / pivot;
    block.each([&](int thread, State&) {
      for (int i = thread; i < n; i += kInverseThreads) shared.column[i] = i < k ? shared.at(k, i) : shared.at(i, k);
    });
    block.each([&](int thread, State&) {
      for (int i = thread / kSide; i < n; i += kSide) {
        const double scaled = shared.column[i] * reciprocal;
        for (int j = thread % kSide; j <= i; j += kSide) {
          double& entry = shared.at(i, j);
          if (i == k) {
            entry = j == k ? -reciprocal : shared.column[j] * reciprocal;
          } else {
            entry = j == k ? scaled : entry - scaled * shared.column[j];
          }
        }
      }
    });
  }
  block.each([&](int thread, State&) {
    for (int i = thread / kSide; i < n; i += kSide) {
      for (int j = thread % kSide; j <= i; j += kSide) {
        const double value = -shared.at(i, j);
        if (!store(i, j, value)) *shared.bad = 1;
      }
    }
  });
  return *shared.bad ? -1 : 0;
}

template <class T>
KRONFAC_DEVICE double damping_of(const InverseBatch& batch, const InverseProblem& p) {
  return static_cast<double>(static_cast<const T*>(batch.damping)[p.index * batch.damping_stride]);
}
KRONFAC_DEVICE bool valid_damping(double damping) { return finite(damping) && damping >= 0; }

// n <= kSmallOrder: all of it.
template <class T, class Block>
KRONFAC_DEVICE void small_inverse(Block& block, double* memory, const InverseBatch& batch, int32_t number) {
  using State = typename Block::State;
  const InverseProblem& p = batch.problem[number];
  const int n = p.n;
  const T* f = static_cast<const T*>(p.f);
  T* x = static_cast<T*>(p.x);
  const double damping = damping_of<T>(batch, p);
  int32_t info = -1;
  if (valid_damping(damping)) {
    info = sweep_small(
        block, sweep_shared(memory, n), n,
        [&](int i, int j) {
          return static_cast<double>(f[i * p.row_stride + j * p.column_stride]) + (i == j ? damping : 0.0);
        },
        [&](int i, int j, double value) {
          const T rounded = static_cast<T>(value);
          x[static_cast<int64_t>(i) * n + j] = rounded;
          x[static_cast<int64_t>(j) * n + i] = rounded;
          return finite(rounded);
        });
  }
  block.each([&](int thread, State&) {
    if (thread == 0) batch.info[p.index] = info;
    if (info == 0) return;
    for (int at = thread; at < n * n; at += kInverseThreads) x[at] = static_cast<T>(NAN);
  });
}

// n > kSmallOrder. x := the lower triangle of f + damping I, one tile to a block of threads.
template <class T, class Block>
KRONFAC_DEVICE void inverse_load(Block& block, const InverseBatch& batch, int32_t number) {
  const InverseTask task = inverse_task(batch, number);
  const InverseProblem& p = task.problem;
  const LowerTile tile = lower_tile(task.number);
  const T* f = static_cast<const T*>(p.f);
  T* x = static_cast<T*>(p.x);
  const double damping = damping_of<T>(batch, p);
  block.each([&](int thread, typename Block::State&) {
    bool good = valid_damping(damping);
    for (int at = thread; at < kPivots * kPivots; at += kInverseThreads) {
      const int64_t i = tile.row * kPivots + at / kPivots, j = tile.column * kPivots + at % kPivots;
      if (i >= p.n || j > i) continue;
      const T value = f[i * p.row_stride + j * p.column_stride] + (i == j ? static_cast<T>(damping) : T(0));
      x[i * p.n + j] = value;
      good = good && finite(value);
    }
    if (!good) batch.info[p.index] = -1;  // every thread that writes here writes the same
  });
}

// The pivots [step * kPivots, ...): W.
template <class T, class Block>
KRONFAC_DEVICE void inverse_pivots(Block& block, FactorShared& shared, const InverseBatch& batch, int32_t number,
                                   int32_t step) {
  static_assert(kPivots == kFactorOrder && kInverseThreads == kFactorThreads);
  const InverseProblem& p = batch.problem[number];
  if (batch.info[p.index] != 0) return;
  const int start = step * kPivots, n = p.n - start < kPivots ? p.n - start : kPivots;
  const T* x = static_cast<const T*>(p.x);
  T* w = static_cast<T*>(p.work);
  const int32_t info = factor(
      block, shared, n,
      [&](int i, int j) { return static_cast<double>(x[static_cast<int64_t>(start + i) * p.n + start + j]); },
      [&](int i, int j, double value) {
        const T rounded = static_cast<T>(value);
        w[i * kPivots + j] = rounded;
        return finite(rounded);
      });
  block.each([&](int thread, typename Block::State&) {
    if (thread == 0 && info != 0) batch.info[p.index] = info > 0 ? start + info : info;
  });
}

// Where Y of a matrix lies: (n, kPivots).
template <class T>
KRONFAC_DEVICE T* inverse_y(const InverseProblem& p) {
  return static_cast<T*>(p.work) + kPivots * kPivots;
}

// kPivots rows of Y := -U W^T; W^T in the rows of the pivots.
template <class T, class Block>
KRONFAC_DEVICE void inverse_panel(Block& block, typename InverseTile<T>::Shared& shared, const InverseBatch& batch,
                                  int32_t number, int32_t step) {
  using Tile = InverseTile<T>;
  using State = typename Block::State;
  const InverseTask task = inverse_task(batch, number);
  const InverseProblem& p = task.problem;
  if (batch.info[p.index] != 0) return;
  const int64_t n = p.n, start = step * kPivots, width = n - start < kPivots ? n - start : kPivots;
  const int64_t row0 = task.number * int64_t{kPivots};
  const T* w = static_cast<const T*>(p.work);
  T* y = inverse_y<T>(p);
  if (task.number == step) {
    block.each([&](int thread, State&) {
      for (int at = thread; at < kPivots * kPivots; at += kInverseThreads) {
        const int64_t i = at / kPivots, k = at % kPivots;
        if (i < width && k < width) y[(row0 + i) * kPivots + k] = w[k * kPivots + i];
      }
    });
    return;
  }
  // Rows below the pivots lie in the lower triangle as they are, those above as columns.
  const T* x = static_cast<const T*>(p.x);
  const Operand<T> u =
      task.number > step ? Operand<T>{x + start, 1, n, n, false} : Operand<T>{x + start * n, n, 1, n, false};
  const Operand<T> factor{w, 1, kPivots, width, false};
  block.each([&](int, State& state) { Tile::clear(state.tile); });
  int64_t k = 0;
  Tile::run(
      block, shared, u.along_k(), factor.along_k(), (width + Tile::kDepth - 1) / Tile::kDepth,
      [&](int thread, typename Tile::State& state) {
        Tile::template load<kPivots>(thread, u, k, width, row0, state.a);
        Tile::template load<kPivots>(thread, factor, k, width, 0, state.b);
      },
      [&] { k += Tile::kDepth; }, [](State&) {});
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t i = row0 + Tile::row(thread, r), column = Tile::column(thread, c);
        if (i < n && column < width) y[i * kPivots + column] = -state.tile.sum[r][c];
      }
    }
  });
}

// One tile of the lower triangle: A - Y Y^T, and -Y Y^T in the rows and columns of the pivots.
template <class T, class Block>
KRONFAC_DEVICE void inverse_update(Block& block, typename InverseTile<T>::Shared& shared, const InverseBatch& batch,
                                   int32_t number, int32_t step) {
  using Tile = InverseTile<T>;
  using State = typename Block::State;
  const InverseTask task = inverse_task(batch, number);
  const InverseProblem& p = task.problem;
  if (batch.info[p.index] != 0) return;
  const LowerTile tile = lower_tile(task.number);
  const int64_t n = p.n, start = step * kPivots, width = n - start < kPivots ? n - start : kPivots;
  const int64_t row0 = tile.row * int64_t{kPivots}, column0 = tile.column * int64_t{kPivots};
  const bool anew = tile.row == step || tile.column == step;
  T* x = static_cast<T*>(p.x);
  const Operand<T> y{inverse_y<T>(p), 1, kPivots, n, false};
  block.each([&](int, State& state) { Tile::clear(state.tile); });
  int64_t k = 0;
  Tile::run(
      block, shared, true, true, (width + Tile::kDepth - 1) / Tile::kDepth,
      [&](int thread, typename Tile::State& state) {
        Tile::template load<kPivots>(thread, y, k, width, row0, state.a);
        Tile::template load<kPivots>(thread, y, k, width, column0, state.b);
      },
      [&] { k += Tile::kDepth; }, [](State&) {});
  block.each([&](int thread, State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t i = row0 + Tile::row(thread, r), j = column0 + Tile::column(thread, c);
        if (i < n && j <= i) x[i * n + j] = (anew ? T(0) : x[i * n + j]) - state.tile.sum[r][c];
      }
    }
  });
}

// Both triangles of x := minus its lower one; info := -1 where an entry is not finite.
template <class T, class Block>
KRONFAC_DEVICE void inverse_finish(Block& block, const InverseBatch& batch, int32_t number) {
  const InverseTask task = inverse_task(batch, number);
  const InverseProblem& p = task.problem;
  if (batch.info[p.index] > 0) return;
  const LowerTile tile = lower_tile(task.number);
  T* x = static_cast<T*>(p.x);
  block.each([&](int thread, typename Block::State&) {
    for (int at = thread; at < kPivots * kPivots; at += kInverseThreads) {
      const int64_t i = tile.row * kPivots + at / kPivots, j = tile.column * kPivots + at % kPivots;
      if (i >= p.n || j > i) continue;
      const T value = -x[i * p.n + j];
      x[i * p.n + j] = value;
      x[j * p.n + i] = value;
      if (!finite(value)) batch.info[p.index] = -1;
    }
  });
}

// x := NaN, both triangles, where info says that it is none.
template <class T, class Block>
KRONFAC_DEVICE void inverse_poison(Block& block, const InverseBatch& batch, int32_t number) {
  const InverseTask task = inverse_task(batch, number);
  const InverseProblem& p = task.problem;
  if (batch.info[p.index] == 0) return;
  const LowerTile tile = lower_tile(task.number);
  T* x = static_cast<T*>(p.x);
  block.each([&](int thread, typename Block::State&) {
    for (int at = thread; at < kPivots * kPivots; at += kInverseThreads) {
      const int64_t i = tile.row * kPivots + at / kPivots, j = tile.column * kPivots + at % kPivots;
      if (i >= p.n || j > i) continue;
      x[i * p.n + j] = static_cast<T>(NAN);
      x[j * p.n + i] = static_cast<T>(NAN);
    }
  });
}

// The launches of a batch in order; `go` makes them, on the GPU or in a test: go.small(blocks), go.load(blocks), ...
template <class Launch>
void inverse_launches(InverseBatch& batch, const Launch& go) {
  if (batch.count == 0) return;
  const auto one = [](int32_t) { return int32_t{1}; };
  if (batch.problem[0].n <= kSmallOrder) {
    go.small(batch.layout(0, one));
    return;
  }
  go.load(batch.layout(0, InverseBatch::tiles));
  const int32_t steps = InverseBatch::blocks(batch.problem[0].n);
  for (int32_t step = 0; step < steps; ++step) {
    const int32_t least = step * kPivots;
    go.pivots(batch.layout(least, one), step);
    go.panel(batch.layout(least, InverseBatch::blocks), step);
    go.update(batch.layout(least, InverseBatch::tiles), step);
  }
  go.finish(batch.layout(0, InverseBatch::tiles));
  go.poison(batch.layout(0, InverseBatch::tiles));
}

}  // namespace kronfac::cuda
