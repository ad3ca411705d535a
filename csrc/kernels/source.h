// Operands of a packed product as things that can fill panels, so that a kernel can pack patches, squares or a column
// of ones on the fly. For kernels only.
#pragma once

#include <cstdint>

#include "kernels/elements.h"
#include "kernels/gemm.h"

namespace kronfac::kernels::KRONFAC_ISA {

inline constexpr int64_t panel_alignment = 64;

static constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
constexpr Blocks blocks_of() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return kBlocksF32;
  } else {
    return kBlocksF64;
  }
}

// `k` runs along the sum, `j` along the rows of the product (left operand) or its columns (right operand). pack writes
// ceil(nj / NR) panels one after another, each [nk][NR], for k in [k0, k0 + nk) and j in [j0, j0 + nj); columns past nj
// are zero.
template <class T>
struct Source {
  void (*pack)(const void* context, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels);
  const void* context;
  // Every entry is a bfloat16 number.
  bool bfloat = false;
  // Where the first `columns` of the j are a matrix with k along its rows, that matrix.
  Matrix matrix{};
  int64_t columns = 0;
};

// Fills the panels above from a matrix stored with k along rows and j along columns; each entry goes through `map`
// after its conversion to T.
template <class T, class Map>
static inline void pack_matrix_panels(const Matrix& matrix, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels,
                                      Map map) {
  constexpr int width = blocks_of<T>().nr;
  const int64_t k_stride = matrix.row_stride, j_stride = matrix.col_stride;
  visit(matrix.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    const S* source = static_cast<const S*>(matrix.data) + k0 * k_stride + j0 * j_stride;
    const int64_t whole = nj / width, rest = nj % width;
    if (j_stride == 1) {
      // Along the rows of the matrix, over all panels: reads run through memory, and the writes of one k are few
      // streams.
      for (int64_t k = 0; k < nk; ++k) {
        const S* row = source + k * k_stride;
        T* out = panels + k * width;
        for (int64_t p = 0; p < whole; ++p) {
          for (int j = 0; j < width; ++j) out[p * nk * width + j] = map(convert<T>(row[p * width + j]));
        }
      }
    } else {
      for (int64_t p = 0; p < whole; ++p) {
        const S* panel_source = source + p * width * j_stride;
        T* panel = panels + p * nk * width;
        // Runs of 16 along k: long enough to read whole cache lines where k is contiguous, short enough that the
        // written lines stay in L1.
        for (int64_t k0_run = 0; k0_run < nk; k0_run += 16) {
          const int64_t run = smaller(16, nk - k0_run);
          for (int j = 0; j < width; ++j) {
            const S* column = panel_source + j * j_stride + k0_run * k_stride;
            T* out = panel + k0_run * width + j;
            if (k_stride == 1) {
              for (int64_t k = 0; k < run; ++k) out[k * width] = map(convert<T>(column[k]));
            } else {
              for (int64_t k = 0; k < run; ++k) out[k * width] = map(convert<T>(column[k * k_stride]));
            }
          }
        }
      }
    }
    if (rest > 0) {
      const S* panel_source = source + whole * width * j_stride;
      T* panel = panels + whole * nk * width;
      for (int64_t k = 0; k < nk; ++k) {
        const S* row = panel_source + k * k_stride;
        T* out = panel + k * width;
        // In whole chunks of fixed length as far as they go, which the compiler turns into single vectors.
        constexpr int chunk = 4;
        int64_t j = 0;
        if (j_stride == 1) {
          for (; j + chunk <= rest; j += chunk) {
            for (int c = 0; c < chunk; ++c) out[j + c] = map(convert<T>(row[j + c]));
          }
        }
        for (; j < rest; ++j) out[j] = map(convert<T>(row[j * j_stride]));
        for (; j % chunk != 0; ++j) out[j] = T(0);
        for (; j < width; j += chunk) {
          for (int c = 0; c < chunk; ++c) out[j + c] = T(0);
        }
      }
    }
  });
}

// The same with a column of ones behind the last of `columns` (the bias of a layer), seen as column number `columns`.
template <class T, class Map>
static inline void pack_with_ones(const Matrix& matrix, int64_t columns, int64_t k0, int64_t nk, int64_t j0, int64_t nj,
                                  T* panels, Map map) {
  constexpr int64_t width = blocks_of<T>().nr;
  const int64_t stored = smaller(nj, columns - j0);  // negative never: j0 <= columns
  pack_matrix_panels<T>(matrix, k0, nk, j0, stored, panels, map);
  if (stored == nj) return;
  T* panel = panels + stored / width * nk * width;
  const int64_t lane = stored % width;
  for (int64_t k = 0; k < nk; ++k) {
    if (lane == 0) {
      for (int64_t j = 0; j < width; ++j) panel[k * width + j] = T(0);
    }
    panel[k * width + lane] = T(1);
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA
