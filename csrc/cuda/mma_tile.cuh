// A square tile (128, or 64) of a product C(i, j) = sum_k A(k, i) B(k, j) on tensor cores, in the registers of four
// warps: bfloat16 and float16 as they are, float32 rounded to TF32; sums in float32.
//
// Steps of kDepth rows of A and B pass through shared memory, of which kStages are on their way or in use: while one is
// multiplied, the next three are being copied, by the copy unit where rows are aligned, else through registers. One
// barrier a step.
//
// Floor of a step: 32 KiB read from shared memory and 16 KiB written, at 128 bytes a cycle 384 cycles; 128 x 128 x
// kDepth multiply-adds, at 1024 a cycle (A100, bfloat16; TF32 half of it, at half the depth) 512, and at the 1280 or so
// that mma.sync reaches of an H100's 2048, 410. Warps with 64 x 32 of the sums would read 48 KiB and be bound by that.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

template <class In_, int kSide_ = 128>
struct MmaTile {
  using In = In_;
  using Instruction = MultiplyAdd<In>;
  static constexpr bool kHalves = sizeof(In) == 2;
  static constexpr int kSide = kSide_, kWarpSide = kSide / 2, kThreads = 128, kStages = 4;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(In));
  static constexpr int kRun = 16 / static_cast<int>(sizeof(In));  // entries that are copied at once
  // Rows of shared memory are 16 (TF32: 32) bytes longer than a multiple of all banks: the eight rows of a transposed
  // matrix lie in different banks, and so do the four rows that lanes of a TF32 fragment read.
  static constexpr int kStride = kSide + 8;
  static constexpr int kRowTiles = kWarpSide / 16, kColumnTiles = kWarpSide / 8, kRuns = kWarpSide / 32;

  struct Entries {
    alignas(16) In at[kDepth][kStride];
  };
  struct Stage {
    Entries a, b;
  };
  struct Shared {
    Stage stage[kStages];
  };
  struct State {
    float sum[kRowTiles][kColumnTiles][4];
    uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];  // fragments: of b, two registers for each tile of columns
  };

  // Row and column of the tile that sum[m][n][r] of a thread belongs to. Rows and columns of TF32 tiles are dealt out
  // so that a lane's fragments are neighbours in memory.
  KRONFAC_DEVICE static int row(int thread, int m, int r) {
    const int g = thread % 32 / 4, first = thread / 64 * kWarpSide;
    if constexpr (kHalves) return first + 16 * m + g + r / 2 * 8;
    return first + dealt(g, 2 * m + r / 2);
  }
  KRONFAC_DEVICE static int column(int thread, int n, int r) {
    const int t = thread % 4, first = thread / 32 % 2 * kWarpSide;
    if constexpr (kHalves) return first + 8 * n + 2 * t + r % 2;
    return first + dealt(2 * t + r % 2, n);
  }
  KRONFAC_DEVICE static int dealt(int g, int q) { return q / 4 * 32 + 4 * g + q % 4; }

  KRONFAC_DEVICE static void clear(State& state) {
    KRONFAC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      KRONFAC_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        KRONFAC_UNROLL
        for (int r = 0; r < 4; ++r) state.sum[m][n][r] = 0;
      }
    }
  }

  // Whether copy() may be used: i_stride is 1, rows and base are multiples of 16 bytes.
  static bool copyable(const void* data, int64_t k_stride, int64_t i_stride) {
    return i_stride == 1 && k_stride % kRun == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // A thread's share of kDepth rows from k0 on, kSide columns from i0 on; what lies beyond k1 or the operand is 0. The
  // operand has no column of ones.
  template <class Block>
  KRONFAC_DEVICE static void copy(Block& block, int thread, const Operand<In>& x, int64_t k0, int64_t k1, int64_t i0,
                                  Entries& target) {
    constexpr int kAcross = kSide / kRun, kRows = kThreads / kAcross;
    const int column = thread % kAcross * kRun;
    const int64_t left = x.features - i0 - column;
    const int bytes = left <= 0 ? 0 : left < kRun ? static_cast<int>(left * static_cast<int64_t>(sizeof(In))) : 16;
    KRONFAC_UNROLL
    for (int n = 0; n < kDepth / kRows; ++n) {
      const int row = n * kRows + thread / kAcross;
      const bool inside = bytes > 0 && k0 + row < k1;
      block.copy_async(&target.at[row][column], inside ? x.data + (k0 + row) * x.k_stride + i0 + column : x.data,
                       inside ? bytes : 0);
    }
  }
  // The same from any strides, entry by entry.
  KRONFAC_DEVICE static void gather(int thread, const Operand<In>& x, int64_t k0, int64_t k1, int64_t i0,
                                    Entries& target) {
    constexpr int kAtOnce = 8;
    const bool along_k = x.along_k();
    for (int first = 0; first < kSide * kDepth / kThreads; first += kAtOnce) {
      In entries[kAtOnce];
      KRONFAC_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int at = (first + n) * kThreads + thread;
        const int64_t k = k0 + (along_k ? at % kDepth : at / kSide), i = i0 + (along_k ? at / kDepth : at % kSide);
        entries[n] = k < k1 && i < x.features ? x.data[k * x.k_stride + i * x.i_stride] : In{};
      }
      KRONFAC_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int at = (first + n) * kThreads + thread;
        target.at[along_k ? at % kDepth : at / kSide][along_k ? at / kDepth : at % kSide] = entries[n];
      }
    }
  }

  template <class Block>
  KRONFAC_DEVICE static void multiply(Block& block, const Entries& a, const Entries& b) {
    using BlockState = typename Block::State;
    KRONFAC_UNROLL
    for (int k = 0; k < kDepth; k += Instruction::kDepth) {
      if constexpr (kHalves) {
        // Matrix lane / 8 of the four that a load fetches: for a, tile of rows by tile, (rows, k) = (low, low),
        // (high, low), (low, high), (high, high) halves; for b, two tiles of columns, k low and high of each.
        KRONFAC_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          block.template warp<LoadTransposed>([&](int thread, BlockState& state) {
            const int matrix = thread % 32 / 8;
            return LoadTransposed::Lane{
                &a.at[k + matrix / 2 * 8 + thread % 8][thread / 64 * kWarpSide + 16 * m + matrix % 2 * 8],
                state.tile.a[m]};
          });
        }
        KRONFAC_UNROLL
        for (int n = 0; n < kColumnTiles / 2; ++n) {
          block.template warp<LoadTransposed>([&](int thread, BlockState& state) {
            const int matrix = thread % 32 / 8;
            return LoadTransposed::Lane{
                &b.at[k + matrix % 2 * 8 + thread % 8][thread / 32 % 2 * kWarpSide + 16 * n + matrix / 2 * 8],
                state.tile.b[n]};
          });
        }
      } else {
        block.each_warp([&](int thread, BlockState& state) {
          const int g = thread % 32 / 4, t = thread % 4;
          KRONFAC_UNROLL
          for (int part = 0; part < 2 * kRuns; ++part) {  // of the rows k + t and k + t + 4: each 32 entries
            const int row = k + t + part / kRuns * 4, from = part % kRuns * 32 + 4 * g;
            const Run of_a = *reinterpret_cast<const Run*>(&a.at[row][thread / 64 * kWarpSide + from]);
            const Run of_b = *reinterpret_cast<const Run*>(&b.at[row][thread / 32 % 2 * kWarpSide + from]);
            KRONFAC_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int q = part % kRuns * 4 + e;
              state.tile.a[q / 2][q % 2 + part / kRuns * 2] = tf32_bits(of_a.entry[e]);
              state.tile.b[q / 2][q % 2 * 2 + part / kRuns] = tf32_bits(of_b.entry[e]);
            }
          }
        });
      }
      KRONFAC_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        KRONFAC_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          block.template warp<Instruction>([&](int, BlockState& state) {
            return typename Instruction::Lane{state.tile.sum[m][n], state.tile.a[m], &state.tile.b[n / 2][n % 2 * 2]};
          });
        }
      }
    }
  }

  // Adds `steps` steps to the sums. load(thread, step, stage) begins to copy or gathers a thread's share of one; where
  // `same`, B is A and the stage's b is not used. also(thread, state, a) comes with each step. The state of the block
  // has a member `tile` of type State.
  template <class Block, class Load, class Also>
  KRONFAC_DEVICE static void run(Block& block, Shared& shared, bool same, int64_t steps, const Load& load,
                                 const Also& also) {
    using BlockState = typename Block::State;
    KRONFAC_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
      block.each_warp([&](int thread, BlockState&) {
        if (step < steps) load(thread, step, shared.stage[step]);
      });
      block.commit_copies();
    }
    for (int64_t step = 0; step < steps; ++step) {
      // After this barrier the step has arrived, and nobody reads the one before it any more: its place is free.
      block.template await_copies<kStages - 2>();
      const int64_t next = step + kStages - 1;
      block.each_warp([&](int thread, BlockState&) {
        if (next < steps) load(thread, next, shared.stage[next % kStages]);
      });
      block.commit_copies();
      const Stage& stage = shared.stage[step % kStages];
      multiply(block, stage.a, same ? stage.a : stage.b);
      block.each_warp([&](int thread, BlockState& state) { also(thread, state, stage.a); });
    }
  }

 private:
  struct alignas(16) Run {
    In entry[kRun];
  };
};

}  // namespace kronfac::cuda
