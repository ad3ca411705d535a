// A tile of a product C(i, j) = sum_k A(k, i) B(k, j), held in the registers of one block of threads.
//
// The sum is cut into steps of kDepth. While a step is multiplied from one half of the shared memory, the next one is
// on its way from global memory into registers, and goes to the other half: one barrier a step.
#pragma once

#include <cmath>

#include "cuda/block.cuh"

namespace kronfac::cuda {

// A (k, i) matrix of any strides; column `ones`, if there is one, is not in memory.
template <class In>
struct Operand {
  const In* data;
  int64_t k_stride, i_stride;
  int64_t features;  // in memory
  bool ones;         // column number `features` is all ones

  // Whether neighbours in memory have the same i: threads that load then take neighbouring k.
  KRONFAC_DEVICE bool along_k() const { return k_stride == 1 && i_stride != 1; }
  template <class T>
  KRONFAC_DEVICE T at(int64_t k, int64_t i) const {
    if (i < features) return widened<T>(data[k * k_stride + i * i_stride]);
    return ones && i == features ? T(1) : T(0);
  }
};

// Row and column of a tile of the lower triangle, numbered row by row.
struct LowerTile {
  int32_t row, column;
};
KRONFAC_DEVICE LowerTile lower_tile(int32_t number) {
  int32_t row = static_cast<int32_t>((sqrtf(8.0f * static_cast<float>(number) + 1.0f) - 1.0f) / 2.0f);
  while (row * (row + 1) / 2 > number) --row;
  while ((row + 1) * (row + 2) / 2 <= number) ++row;
  return {row, number - row * (row + 1) / 2};
}

template <class T_, int kRows_, int kColumns_, int kDepth_, int kThreadRows_, int kThreadColumns_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_;
  static constexpr int kThreadRows = kThreadRows_, kThreadColumns = kThreadColumns_;
  static constexpr int kAcross = kColumns / kThreadColumns, kThreads = kAcross * (kRows / kThreadRows);
  static constexpr int kRowLoads = kRows * kDepth / kThreads, kColumnLoads = kColumns * kDepth / kThreads;
  // Rows of shared memory are longer by 16 bytes, so that threads that store neighbouring k meet different banks.
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T));
  // A thread's rows and columns come in runs of 16 bytes, read from shared memory at once.
  static constexpr int kRun = 16 / static_cast<int>(sizeof(T));
  static_assert(kThreadRows % kRun == 0 && kThreadColumns % kRun == 0);
  static_assert(kRowLoads * kThreads == kRows * kDepth && kColumnLoads * kThreads == kColumns * kDepth);

  struct Shared {
    alignas(16) T a[2][kDepth][kRows + kPad];
    alignas(16) T b[2][kDepth][kColumns + kPad];
  };
  struct State {
    T sum[kThreadRows][kThreadColumns];
    T a[kRowLoads], b[kColumnLoads];  // of the next step
  };
  struct alignas(16) Run {
    T value[kRun];
  };

  // Row (column) of the tile that entry r (c) of a thread's sums belongs to.
  KRONFAC_DEVICE static int row(int thread, int r) {
    return r / kRun * (kRows / (kThreadRows / kRun)) + thread / kAcross * kRun + r % kRun;
  }
  KRONFAC_DEVICE static int column(int thread, int c) {
    return c / kRun * (kColumns / (kThreadColumns / kRun)) + thread % kAcross * kRun + c % kRun;
  }

  KRONFAC_DEVICE static void clear(State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < kThreadColumns; ++c) state.sum[r][c] = T(0);
    }
  }

  // Entries k in [k0, k1) and i from i0 on into registers; what lies beyond k1 or the operand is 0.
  template <int kWidth, int kLoads, class In, bool kSquare = false>
  KRONFAC_DEVICE static void load(int thread, const Operand<In>& operand, int64_t k0, int64_t k1, int64_t i0,
                                  T (&values)[kLoads]) {
    const bool along_k = operand.along_k();
    KRONFAC_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      const int at = n * kThreads + thread;
      const int64_t k = k0 + (along_k ? at % kDepth : at / kWidth), i = i0 + (along_k ? at / kDepth : at % kWidth);
      const T value = k < k1 ? operand.template at<T>(k, i) : T(0);
      values[n] = kSquare ? value * value : value;
    }
  }
  template <int kWidth, int kLoads>
  KRONFAC_DEVICE static void store(int thread, bool along_k, const T (&values)[kLoads],
                                   T (&target)[kDepth][kWidth + kPad]) {
    KRONFAC_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      const int at = n * kThreads + thread;
      target[along_k ? at % kDepth : at / kWidth][along_k ? at / kDepth : at % kWidth] = values[n];
    }
  }

  KRONFAC_DEVICE static void multiply(int thread, State& state, const Shared& shared, int half) {
    KRONFAC_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      T a[kThreadRows], b[kThreadColumns];
      KRONFAC_UNROLL
      for (int r = 0; r < kThreadRows; r += kRun) {
        const Run run = *reinterpret_cast<const Run*>(&shared.a[half][k][row(thread, r)]);
        KRONFAC_UNROLL
        for (int e = 0; e < kRun; ++e) a[r + e] = run.value[e];
      }
      KRONFAC_UNROLL
      for (int c = 0; c < kThreadColumns; c += kRun) {
        const Run run = *reinterpret_cast<const Run*>(&shared.b[half][k][column(thread, c)]);
        KRONFAC_UNROLL
        for (int e = 0; e < kRun; ++e) b[c + e] = run.value[e];
      }
      KRONFAC_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        KRONFAC_UNROLL
        for (int c = 0; c < kThreadColumns; ++c) state.sum[r][c] += a[r] * b[c];
      }
    }
  }

  // Adds `steps` steps to the sums. load(thread, tile_state) loads the operands of a step into registers; advance()
  // goes to the next step, once for the whole block; after(state) comes when the step before it has been added. The
  // state of the block has a member `tile` of type State.
  template <class Block, class Load, class Advance, class After>
  KRONFAC_DEVICE static void run(Block& block, Shared& shared, bool a_along_k, bool b_along_k, int64_t steps,
                                 const Load& load, const Advance& advance, const After& after) {
    if (steps <= 0) return;
    using BlockState = typename Block::State;
    block.each([&](int thread, BlockState& state) {
      load(thread, state.tile);
      store<kRows>(thread, a_along_k, state.tile.a, shared.a[0]);
      store<kColumns>(thread, b_along_k, state.tile.b, shared.b[0]);
    });
    int half = 0;
    for (; steps > 0; --steps, half ^= 1) {
      const bool more = steps > 1;
      advance();
      block.each([&](int thread, BlockState& state) {
        if (more) load(thread, state.tile);
        multiply(thread, state.tile, shared, half);
        after(state);
        if (more) {
          store<kRows>(thread, a_along_k, state.tile.a, shared.a[half ^ 1]);
          store<kColumns>(thread, b_along_k, state.tile.b, shared.b[half ^ 1]);
        }
      });
    }
  }
};

}  // namespace kronfac::cuda
