// float32 products on the bfloat16 matrix units of x86 (AMX). For kernels only.
//
// Each float32 is the exact sum of three bfloat16 numbers, high + middle + low: 24 bits of mantissa in three times
// eight. Of the nine products of two such sums the six largest are formed; what is left out is below 2^-25 of the
// product and of either sign, less than what a float32 multiplication rounds away. Products of bfloat16 numbers are
// exact in the float32 sums. Six products at sixteen times the rate of AVX-512 leave 2.6 times its rate.
//
// Not the same as float32 arithmetic: an infinite operand gives NaN, numbers from 3.39e38 on count as infinite, and
// parts below 2^-126 are zero, so that an operand below about 1e-33 loses its last bits. Inputs that are bfloat16
// anyway need one product.
//
// A strip is 16 lines of an operand (rows of the left one, columns of the right one) along the sum, in steps of 32
// terms. A step holds for each part one tile of 16 x 16 pairs: term t of the step is paired with term t + 16, which
// lets either operand be split in vectors without moving anything between lanes.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512F__)
#define KRONFAC_SPLIT 1

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/gemm_pack.h"

namespace kronfac::kernels::KRONFAC_ISA {

inline constexpr int64_t kStripLines = 16, kStepTerms = 32, kTileBytes = 1024;
inline constexpr int kFloatParts = 3, kBfloatParts = 1;
// Rows and columns of a block of the result: four tiles hold its sums, and four more the operands.
inline constexpr int64_t kBlock = 2 * kStripLines;
// Terms packed at a time: of both operands of a block that is 48 KiB, an L1 cache, in which one of them stays while the
// other goes by (96 to 160 float32 terms are as good; 256 cost a fifth). Longer sums are sums of such runs.
template <int parts>
inline constexpr int64_t kSplitTerms = 384 / parts;
// A part of the result that stays in L2 (768 KiB) while packed terms of both operands, at most 600 KiB, go by: results
// as large as L3 would be moved to and fro with each run of terms, which costs as much as the products.
inline constexpr int64_t kChunkArea = 192 * 1024, kChunkSide = 512;

constexpr int64_t strip_count(int64_t lines) { return (lines + kStripLines - 1) / kStripLines; }
constexpr int64_t strip_bytes(int64_t terms, int parts) {
  return (terms + kStepTerms - 1) / kStepTerms * parts * kTileBytes;
}

// Everything stored through `data` or before is in memory after this. GCC does not know that the instructions for tiles
// read memory, and may move stores past them.
static inline __attribute__((always_inline)) void complete(const void* data) {
  __asm__ volatile("" : : "r"(data) : "memory");
}

// Tiles are 16 rows of 64 bytes while one of these lives. Other code in the thread configures them for itself, and an
// idle configuration would make every context switch save them.
class Tiles {
 public:
  Tiles() {
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    complete(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
};

typedef uint32_t Words __attribute__((vector_size(64)));

// The nearest bfloat16 numbers.
static inline Vector<float> to_bfloat(Vector<float> x) { return (Vector<float>)(((Words)x + 0x8000u) & 0xffff0000u); }
// Pairs of numbers that are bfloat16 exactly.
static inline Vector<float> pairs(Vector<float> first, Vector<float> second) {
  return (Vector<float>)(((Words)first >> 16) | ((Words)second & 0xffff0000u));
}

// One step of a strip: load_pair(i, first, second) gives vector i of the terms' first and second halves. `along` gets
// the tiles with vector i as row i, `across` with vector i as column i; either may be null.
template <int parts, class Load>
static inline __attribute__((always_inline)) void pack_step(Load load_pair, char* along, char* across) {
  alignas(64) char own[parts * kTileBytes];
  char* tiles = along != nullptr ? along : own;
  const auto row = [](char* at, int p, int i) { return reinterpret_cast<float*>(at + p * kTileBytes) + i * 16; };
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    Vector<float> first, second;
    load_pair(i, first, second);
    if constexpr (parts == 1) {
      store(row(tiles, 0, i), pairs(first, second));
    } else {
      const Vector<float> high0 = to_bfloat(first), high1 = to_bfloat(second);
      first -= high0;
      second -= high1;
      const Vector<float> middle0 = to_bfloat(first), middle1 = to_bfloat(second);
      store(row(tiles, 0, i), pairs(high0, high1));
      store(row(tiles, 1, i), pairs(middle0, middle1));
      store(row(tiles, 2, i), pairs(first - middle0, second - middle1));  // what is left has eight bits at most
    }
  }
  if (across == nullptr) return;
  for (int p = 0; p < parts; ++p) {
    Vector<float> v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = load(row(tiles, p, i));
    transpose<float>(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(row(across, p, i), v[i]);
  }
}

// Lanes of the mask; the others are zero, and their memory is not touched.
static inline Vector<float> load_lanes(const float* p, __mmask16 lanes) {
  return (Vector<float>)_mm512_maskz_loadu_ps(lanes, p);
}
static inline Vector<float> load_lanes(const Bf16* p, __mmask16 lanes) {
  return (Vector<float>)((Words)_mm512_maskz_cvtepu16_epi32(lanes, _mm256_maskz_loadu_epi16(lanes, p)) << 16);
}
static inline Vector<float> load_lanes(const F16* p, __mmask16 lanes) {
  return (Vector<float>)_mm512_maskz_cvtph_ps(lanes, _mm256_maskz_loadu_epi16(lanes, p));
}
static inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n > 0 ? (1u << n) - 1u : 0u);
}

// One step of a strip whose lines lie next to one another: term t of line j at from[t * stride + j], t < terms.
template <int parts, class S>
static inline void pack_lines_step(const S* from, int64_t stride, int64_t terms, __mmask16 lines, char* left,
                                   char* right) {
  const auto load_pair = [&](int i, Vector<float>& first, Vector<float>& second) {
    // The next step: rows are too far apart for the hardware to foresee.
    __builtin_prefetch(from + (i + kStepTerms) * stride, 0, 2);
    __builtin_prefetch(from + (i + 16 + kStepTerms) * stride, 0, 2);
    first = i < terms ? load_lanes(from + i * stride, lines) : Vector<float>{};
    second = i + 16 < terms ? load_lanes(from + (i + 16) * stride, lines) : Vector<float>{};
  };
  pack_step<parts>(load_pair, right, left);
}

// The same for lines along which the terms lie next to one another: term t of line j at from[t + j * stride].
template <int parts, class S>
static inline void pack_terms_step(const S* from, int64_t stride, int64_t terms, int64_t lines, char* left,
                                   char* right) {
  const __mmask16 first_terms = first_lanes(terms), second_terms = first_lanes(terms - 16);
  const auto load_pair = [&](int i, Vector<float>& first, Vector<float>& second) {
    first = i < lines ? load_lanes(from + i * stride, first_terms) : Vector<float>{};
    second = i < lines ? load_lanes(from + i * stride + 16, second_terms) : Vector<float>{};
  };
  pack_step<parts>(load_pair, left, right);
}

// Strips of `lines` lines over `terms` terms, one after another; either of left and right may be null.
template <int parts, class S>
static void pack_lines(const S* source, int64_t stride, int64_t terms, int64_t lines, char* left, char* right) {
  const int64_t bytes = strip_bytes(terms, parts);
  // Rows of the source from end to end, since that is how it lies in memory.
  for (int64_t t = 0; t < terms; t += kStepTerms) {
    const int64_t step = t / kStepTerms * parts * kTileBytes;
    for (int64_t j = 0; j < lines; j += kStripLines) {
      const int64_t at = step + j / kStripLines * bytes, n = smaller(kStripLines, lines - j);
      pack_lines_step<parts>(source + t * stride + j, stride, terms - t, first_lanes(n),
                             left == nullptr ? nullptr : left + at, right == nullptr ? nullptr : right + at);
    }
  }
}

template <int parts, class S>
static void pack_terms(const S* source, int64_t stride, int64_t terms, int64_t lines, char* left, char* right) {
  const int64_t bytes = strip_bytes(terms, parts);
  for (int64_t j = 0; j < lines; j += kStripLines) {
    for (int64_t t = 0; t < terms; t += kStepTerms) {
      const int64_t at = j / kStripLines * bytes + t / kStepTerms * parts * kTileBytes;
      pack_terms_step<parts>(source + t + j * stride, stride, terms - t, smaller(kStripLines, lines - j),
                             left == nullptr ? nullptr : left + at, right == nullptr ? nullptr : right + at);
    }
  }
}

// Whether strips are split straight from the matrix.
static inline bool direct(const Matrix& matrix) {
  return matrix.type != Element::f64 && (matrix.col_stride == 1 || matrix.row_stride == 1);
}

// Strips of the lines j0 <= j < j0 + nj (columns of the matrix) over the terms k0 <= k < k0 + nk (its rows), one after
// another. staging: nk * 16 floats.
template <int parts>
static void pack_strips(const Matrix& matrix, int64_t k0, int64_t nk, int64_t j0, int64_t nj, char* left, char* right,
                        float* staging) {
  if (direct(matrix)) {
    return visit(matrix.type, [&](auto* tag) {
      using S = __typeof__(*tag);
      if constexpr (sizeof(S) < sizeof(double)) {
        const S* source = static_cast<const S*>(matrix.data) + k0 * matrix.row_stride + j0 * matrix.col_stride;
        if (matrix.col_stride == 1) return pack_lines<parts>(source, matrix.row_stride, nk, nj, left, right);
        pack_terms<parts>(source, matrix.col_stride, nk, nj, left, right);
      }
    });
  }
  const int64_t bytes = strip_bytes(nk, parts);
  for (int64_t j = 0; j < nj; j += kStripLines) {
    const int64_t lines = smaller(kStripLines, nj - j);
    pack_panels<float, kStripLines>(matrix, k0, nk, j0 + j, lines, staging);
    pack_lines<parts>(staging, kStripLines, nk, lines, left, right);
    if (left != nullptr) left += bytes;
    if (right != nullptr) right += bytes;
  }
}

// One operand of a block: its first strip, the distance to the second, and the first strip of the block that comes
// next.
struct Strips {
  const char* data;
  int64_t distance;
  const char* next;
};

// block (32 x 32, row-major) := left right, `rows` strips of the left operand by `columns` of the right one, each one
// or two. Sums start from zero, so that their rounding does not grow with what they are added to.
template <int parts, int rows, int columns>
static inline void strip_product(int64_t steps, const Strips& left, const Strips& right, float* block) {
  constexpr int64_t size = parts * kTileBytes;
  complete(left.data);
  complete(right.data);
  _tile_zero(0);
  if constexpr (columns > 1) _tile_zero(1);
  if constexpr (rows > 1) _tile_zero(2);
  if constexpr (rows > 1 && columns > 1) _tile_zero(3);
  const char *a = left.data, *b = right.data;
  const auto load_left = [&](int part) __attribute__((always_inline)) {
    _tile_loadd(4, a + part * kTileBytes, 64);
    if constexpr (rows > 1) _tile_loadd(5, a + left.distance + part * kTileBytes, 64);
  };
  const auto load_right = [&](int part) __attribute__((always_inline)) {
    _tile_loadd(6, b + part * kTileBytes, 64);
    if constexpr (columns > 1) _tile_loadd(7, b + right.distance + part * kTileBytes, 64);
  };
  for (int64_t step = 0; step < steps; ++step) {
    const bool last = step + 1 == steps;
    const char *next_a = last ? left.next : a + size, *next_b = last ? right.next : b + size;
    // What the next step loads comes into L1 meanwhile, a part of it with each product.
    const auto multiply = [&](int part, int parts_of_step) __attribute__((always_inline)) {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (columns > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (rows > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (rows > 1 && columns > 1) _tile_dpbf16ps(3, 5, 7);
      const int64_t lines = size / 64 / parts_of_step;
#pragma GCC unroll 16
      for (int64_t line = part * lines; line < (part + 1) * lines; ++line) {
        __builtin_prefetch(next_a + line * 64);
        if constexpr (rows > 1) __builtin_prefetch(next_a + left.distance + line * 64);
        __builtin_prefetch(next_b + line * 64);
        if constexpr (columns > 1) __builtin_prefetch(next_b + right.distance + line * 64);
      }
    };
    load_left(0);
    load_right(0);
    if constexpr (parts == 1) {
      multiply(0, 1);
    } else {
      // In an order in which one operand of each product is there already, but for one.
      multiply(0, 6);
      load_right(2);
      multiply(1, 6);
      load_right(1);
      multiply(2, 6);
      load_left(1);
      multiply(3, 6);
      load_right(0);
      multiply(4, 6);
      load_left(2);
      multiply(5, 6);
    }
    a = next_a;
    b = next_b;
  }
  constexpr size_t line = kBlock * sizeof(float);
  _tile_stored(0, block, line);
  if constexpr (columns > 1) _tile_stored(1, block + 16, line);
  if constexpr (rows > 1) _tile_stored(2, block + 512, line);
  if constexpr (rows > 1 && columns > 1) _tile_stored(3, block + 512 + 16, line);
}

template <int parts>
static inline void strip_product(bool two_rows, bool two_columns, int64_t steps, const Strips& left,
                                 const Strips& right, float* block) {
  if (two_rows && two_columns) return strip_product<parts, 2, 2>(steps, left, right, block);
  if (two_rows) return strip_product<parts, 2, 1>(steps, left, right, block);
  if (two_columns) return strip_product<parts, 1, 2>(steps, left, right, block);
  strip_product<parts, 1, 1>(steps, left, right, block);
}

// The blocks of a chunk over one run of terms, from `rows` lines of left strips and `columns` of right ones.
// merge(block, i, j, rows, columns) adds one at (i, j). below: distance of the chunk's first entry from the diagonal,
// above which (below it when negative) nothing is wanted; kNoDiagonal where all is.
inline constexpr int64_t kNoDiagonal = int64_t{1} << 40;

template <int parts, class Merge>
static inline void multiply_chunk(int64_t rows, int64_t columns, int64_t terms, const char* left, const char* right,
                                  int64_t below, Merge merge) {
  const int64_t bytes = strip_bytes(terms, parts), steps = bytes / (parts * kTileBytes);
  const auto first_row = [&](int64_t j) { return larger(0, (j - below) / kBlock * kBlock); };
  for (int64_t j = 0; j < columns; j += kBlock) {
    for (int64_t i = first_row(j); i < rows; i += kBlock) {
      const int64_t height = smaller(kBlock, rows - i);
      if (below + i + height - 1 < j) continue;
      // Of a block that only touches the diagonal, one strip of columns.
      const int64_t width = smaller(below + i + height - j <= kStripLines ? kStripLines : kBlock, columns - j);
      const bool end = i + kBlock >= rows;
      const int64_t next_i = end ? first_row(j + kBlock) : i + kBlock, next_j = end ? j + kBlock : j;
      alignas(panel_alignment) float block[kBlock * kBlock];
      strip_product<parts>(height > kStripLines, width > kStripLines, steps,
                           {left + i / kStripLines * bytes, bytes, left + next_i / kStripLines * bytes},
                           {right + j / kStripLines * bytes, bytes, right + next_j / kStripLines * bytes}, block);
      merge(block, i, j, height, width);
    }
  }
}

// c := beta * c + alpha * block for `columns` entries of one row.
static inline __attribute__((always_inline)) void merge_row(const float* block, int64_t columns, float alpha,
                                                            float beta, float* c) {
  if (columns == kBlock) {
    const Vector<float> v = alpha * load(block), w = alpha * load(block + kStripLines);
    store(c, beta == 0 ? v : beta * load(c) + v);
    store(c + kStripLines, beta == 0 ? w : beta * load(c + kStripLines) + w);
    return;
  }
  for (int64_t j = 0; j < columns; j += kLanes<float>) {
    const int64_t n = smaller(kLanes<float>, columns - j);
    const Vector<float> v = alpha * load(block + j);
    if (n == kLanes<float>) {
      store(c + j, beta == 0 ? v : beta * load(c + j) + v);
    } else {
      store_first(c + j, beta == 0 ? v : beta * load_first(c + j, n) + v, n);
    }
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA

#endif
