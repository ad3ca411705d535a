// The general product of gemm.h for float32 on bfloat16 matrix units (split.h). For kernels only.
#pragma once

#include "kernels/split.h"

#ifdef KRONFAC_SPLIT

namespace kronfac::kernels::KRONFAC_ISA {

// Splitting costs each operand about as much as so many columns or rows of multiply-adds; sums too short leave tiles
// empty.
static inline bool gemm_split_worthwhile(int64_t m, int64_t n, int64_t k) { return k >= 64 && m * n >= 40 * (m + n); }

// Chunks of C as even as they can be.
struct GemmChunks {
  int64_t rows, columns;
  GemmChunks(int64_t m, int64_t n) {
    rows = even(m, kChunkSide);
    columns = even(n, kChunkArea / larger(rows, kChunkArea / 2048) / kBlock * kBlock);
  }

 private:
  static constexpr int64_t even(int64_t n, int64_t most) {
    const int64_t count = larger(1, (n + most - 1) / most);
    return round_up((n + count - 1) / count, kBlock);
  }
};

// Sums of a chunk, block after block: rows of C may be a power of two apart, which few cache sets would have to hold.
inline constexpr int64_t kChunkBytes = kChunkArea * static_cast<int64_t>(sizeof(float));

struct GemmSplitLayout {
  int64_t left, right;  // bytes
  GemmSplitLayout(int64_t m, int64_t n, int64_t k) {
    const GemmChunks chunks(m, n);
    const int64_t bytes = strip_bytes(smaller(k, kSplitTerms<kFloatParts>), kFloatParts);
    left = strip_count(chunks.rows) * bytes;
    right = strip_count(chunks.columns) * bytes;
  }

  // Of all scratch, for any product of at most these sizes: one of fewer rows may have chunks of more columns. Of two
  // sides whose product is bounded the sum is largest where one of them is.
  static int64_t most_bytes(int64_t m, int64_t n, int64_t k) {
    const int64_t terms = smaller(k, kSplitTerms<kFloatParts>);
    const int64_t rows = smaller(round_up(m, kBlock), kChunkSide), columns = smaller(round_up(n, kBlock), 2048);
    const int64_t tall = rows + smaller(columns, kChunkArea / larger(rows, 1)),
                  wide = columns + smaller(rows, kChunkArea / larger(columns, 1));
    return kChunkBytes + strip_count(larger(tall, wide) + kBlock) * strip_bytes(terms, kFloatParts) +
           terms * kStripLines * static_cast<int64_t>(sizeof(float));
  }
};

// sums := block, or += where not fresh; whole blocks.
static inline __attribute__((always_inline)) void add_block(const float* block, bool fresh, float* sums) {
#pragma GCC unroll 4
  for (int64_t at = 0; at < kBlock * kBlock; at += kLanes<float>) {
    store(sums + at, fresh ? load(block + at) : load(sums + at) + load(block + at));
  }
}

static inline void gemm_split(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& a, const Matrix& b,
                              float beta, float* c, int64_t ldc, const Triangle& triangle, void* scratch) {
  constexpr int parts = kFloatParts;
  constexpr int64_t run = kSplitTerms<parts>;
  const GemmChunks chunks(m, n);
  const GemmSplitLayout layout(m, n, k);
  float* sums = static_cast<float*>(scratch);
  char* left = static_cast<char*>(scratch) + kChunkBytes;
  char* right = left + layout.left;
  float* staging = reinterpret_cast<float*>(right + layout.right);
  const Matrix rows_of_a = a.transposed();
  const Tiles tiles;
  for (int64_t j0 = 0; j0 < n; j0 += chunks.columns) {
    const int64_t nc = smaller(chunks.columns, n - j0);
    bool packed = false;
    for (int64_t i0 = 0; i0 < m; i0 += chunks.rows) {
      const int64_t mc = smaller(chunks.rows, m - i0);
      const int64_t below = triangle.lower ? triangle.row0 + i0 - triangle.col0 - j0 : kNoDiagonal;
      if (below + mc - 1 < 0) continue;
      for (int64_t p = 0; p < k; p += run) {
        const int64_t terms = smaller(run, k - p);
        pack_strips<parts>(rows_of_a, p, terms, i0, mc, left, nullptr, staging);
        // All of B's terms at hand serve all chunks of rows.
        if (!packed || k > run) pack_strips<parts>(b, p, terms, j0, nc, nullptr, right, staging);
        packed = true;
        const bool first = p == 0, last = p + run >= k;
        multiply_chunk<parts>(mc, nc, terms, left, right, below,
                              [&](float* block, int64_t i, int64_t j, int64_t rows, int64_t columns) {
                                float* sum = sums + (j * chunks.rows + i * kBlock);
                                if (!last) return add_block(block, first, sum);
                                if (!first) add_block(sum, false, block);
                                for (int64_t r = 0; r < rows; ++r) {
                                  merge_row(block + r * kBlock, smaller(columns, below + i + r + 1 - j), alpha, beta,
                                            c + (i0 + i + r) * ldc + j0 + j);
                                }
                              });
      }
    }
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA

#endif
