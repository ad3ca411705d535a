// The update of symmetric.h for float32 sums on bfloat16 matrix units (split.h). For kernels only.
#pragma once

#include "kernels/split.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__)

namespace kronfac::kernels::KRONFAC_ISA {

// Below this a run is not worth splitting: the vector unit is as fast.
static inline bool split_worthwhile(int64_t terms, int64_t rows) { return terms >= 96 && rows >= 96; }

// Side of a chunk: all of the triangle where it is not much larger than a chunk.
static inline int64_t split_side(int64_t row1) { return row1 <= kChunkSide * 5 / 4 ? row1 : kChunkSide; }

struct SplitLayout {
  int64_t strips, staging;  // bytes, the strips for each operand
  SplitLayout(int64_t terms, int64_t row1, int parts) {
    const int64_t packed = smaller(terms, parts == 1 ? kSplitTerms<1> : kSplitTerms<3>);
    strips = strip_count(split_side(row1)) * strip_bytes(packed, parts);
    staging = round_up(packed * kBlocksF32.nr * static_cast<int64_t>(sizeof(float)), panel_alignment);
  }
  int64_t bytes() const { return 2 * strips + staging; }
};

// Left, right, or both strips of the lines [first, last); first is a multiple of kStripLines.
template <int parts>
static void pack_source(const Source<float>& source, int64_t k, int64_t terms, int64_t first, int64_t last, char* left,
                        char* right, float* staging) {
  if (first >= last) return;
  int64_t plain = 0;
  if (direct(source.matrix)) plain = source.columns >= last ? last : source.columns / kStripLines * kStripLines;
  if (plain > first) pack_strips<parts>(source.matrix, k, terms, first, plain - first, left, right, nullptr);
  for (int64_t j = larger(first, plain); j < last; j += kStripLines) {
    const int64_t lines = smaller(kStripLines, last - j), at = (j - first) / kStripLines * strip_bytes(terms, parts);
    source.pack(source.context, k, terms, j, lines, staging);
    pack_lines<parts>(staging, kBlocksF32.nr, terms, lines, left == nullptr ? nullptr : left + at,
                      right == nullptr ? nullptr : right + at);
  }
}

// What update_run does (symmetric_update.h), with scratch of SplitLayout::bytes.
template <int parts>
static void update_run_split(const Source<float>& source, int64_t k0, int64_t k1, int64_t row0, int64_t row1,
                             float* sum, int64_t ld, void* scratch) {
  const SplitLayout layout(k1 - k0, row1, parts);
  const int64_t side = split_side(row1);
  char* left = static_cast<char*>(scratch);
  char* right = left + layout.strips;
  float* staging = reinterpret_cast<float*>(right + layout.strips);
  const Tiles tiles;
  for (int64_t i0 = row0; i0 < row1; i0 += side) {
    const int64_t i1 = smaller(i0 + side, row1);
    for (int64_t j0 = 0; j0 < i1; j0 += side) {
      const int64_t j1 = smaller(j0 + side, i1);
      // Lines that both operands want are split once.
      const int64_t both0 = larger(i0, j0), both1 = larger(both0, smaller(i1, j1));
      for (int64_t k = k0; k < k1; k += kSplitTerms<parts>) {
        const int64_t terms = smaller(kSplitTerms<parts>, k1 - k), bytes = strip_bytes(terms, parts);
        const auto left_of = [&](int64_t line) { return left + (line - i0) / kStripLines * bytes; };
        const auto right_of = [&](int64_t line) { return right + (line - j0) / kStripLines * bytes; };
        if (both0 < both1) {
          pack_source<parts>(source, k, terms, both0, both1, left_of(both0), right_of(both0), staging);
          pack_source<parts>(source, k, terms, i0, both0, left, nullptr, staging);
          pack_source<parts>(source, k, terms, both1, i1, left_of(both1), nullptr, staging);
          pack_source<parts>(source, k, terms, j0, both0, nullptr, right, staging);
          pack_source<parts>(source, k, terms, both1, j1, nullptr, right_of(both1), staging);
        } else {
          pack_source<parts>(source, k, terms, i0, i1, left, nullptr, staging);
          pack_source<parts>(source, k, terms, j0, j1, nullptr, right, staging);
        }
        const float keep = k == k0 ? 0 : 1;
        multiply_chunk<parts>(i1 - i0, j1 - j0, terms, left, right, i0 - j0,
                              [&](const float* block, int64_t i, int64_t j, int64_t rows, int64_t columns) {
                                for (int64_t r = 0; r < rows; ++r) {
                                  merge_row(block + r * kBlock, columns, 1, keep,
                                            sum + (i0 - row0 + i + r) * ld + j0 + j);
                                }
                              });
      }
    }
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA

#endif
