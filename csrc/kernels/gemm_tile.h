// The register tiles of the general product: a few rows of C times a few vectors of columns, written straight into C.
// For kernels only.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/source.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {

// What a tile reads and writes. Left: entry (i, k) at a[i * a_row] (k unit stride) where it is read in place, or at
// a[k * MR + i] where it is packed. Right: row k at b + k * b_row, whole vectors. Only `tail` lanes of the last vector
// belong to C.
template <class T>
struct TileOperands {
  const T* a;
  int64_t a_row;
  const T* b;
  int64_t b_row;
  // One cache line of each row of what is multiplied next, fetched meanwhile; any readable or unreadable address.
  const T* next;
  int64_t next_row;
  T alpha, beta;
  T* c;
  int64_t ldc, tail;
};

template <class T>
using TileKernel = void (*)(int64_t kc, const TileOperands<T>& t);

// C := beta C + alpha A B for one tile. Every entry of C sees the same operations in the same order whatever the tile's
// size and wherever the operands lie.
template <class T, int rows, int vectors, bool in_place>
void gemm_tile(int64_t kc, const TileOperands<T>& t) {
  constexpr int packed_rows = blocks_of<T>().mr;
  constexpr int64_t lanes = kLanes<T>;
  const T *a = t.a, *b = t.b;
  const T* next = t.next;
  const int64_t a_row = t.a_row, b_row = t.b_row, next_row = t.next_row, ldc = t.ldc;
  T* c = t.c;
  // The tile of C is needed after the sum, by when it has arrived.
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(c + i * ldc + j * lanes, 1);
  }
  Vector<T> sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vector<T>{};
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < kc; ++k) {
    Vector<T> right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = load(b + j * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vector<T> left = (in_place ? a[i * a_row + k] : a[i]) - Vector<T>{};
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
    }
    if constexpr (!in_place) a += packed_rows;
    b += b_row;
    __builtin_prefetch(next, 0, 2);
    next += next_row;
  }
  const T alpha = t.alpha, beta = t.beta;
  const int64_t tail = t.tail;
  if (beta == T(0)) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        T* out = c + i * ldc + j * lanes;
        if (j + 1 < vectors || tail == lanes) {
          store(out, alpha * sum[i][j]);
        } else {
          store_first(out, alpha * sum[i][j], tail);
        }
      }
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        T* out = c + i * ldc + j * lanes;
        if (j + 1 < vectors || tail == lanes) {
          store(out, beta * load(out) + alpha * sum[i][j]);
        } else {
          store_first(out, beta * load_first(out, tail) + alpha * sum[i][j], tail);
        }
      }
    }
  }
}

// The kernels for all sizes up to the full tile, by [rows - 1][vectors - 1].
template <class T, bool in_place>
struct TileKernels {
  static constexpr int mr = blocks_of<T>().mr, vectors = blocks_of<T>().nr / static_cast<int>(kLanes<T>);
  static constexpr int sizes = mr * vectors;
  TileKernel<T> kernel[sizes];

  constexpr TileKernels() : TileKernels(std::make_integer_sequence<int, sizes>{}) {}
  TileKernel<T> operator()(int64_t rows, int64_t n) const { return kernel[(rows - 1) * vectors + n - 1]; }

 private:
  template <int... at>
  constexpr explicit TileKernels(std::integer_sequence<int, at...>)
      : kernel{gemm_tile<T, at / vectors + 1, at % vectors + 1, in_place>...} {}
};

template <class T, bool in_place>
inline constexpr TileKernels<T, in_place> kTileKernels;

}  // namespace kronfac::kernels::KRONFAC_ISA
