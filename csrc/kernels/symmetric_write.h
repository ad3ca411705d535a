// Writes sums of a lower triangle into both triangles of a result. For kernels only.
#pragma once

#include <cstdint>

#include "kernels/gemm_pack.h"
#include "kernels/source.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {

// How a result is written. stream: past the caches, which a large result would only flush, and without reading first
// what will be overwritten; needs whole, aligned cache lines. add: to decay times the old value. Known to the compiler,
// because a branch at every vector keeps it from overlapping their loads, permutations and stores.
enum class Write { plain, stream, add };

// Results from here on are streamed: more than a core's share of its caches.
inline constexpr int64_t kStreamBytes = int64_t{8} << 20;

// out := decay * out + scale * sums; decay == 0 does not read out.
template <class T, Write write>
struct Merge {
  T decay, scale;
  T* out;
  int64_t row_stride, col_stride;

  // Both triangles get the same sums, so a column-major out is its own transpose.
  Merge(T decay_, T scale_, T* out_, int64_t row_stride_, int64_t col_stride_)
      : decay(decay_), scale(scale_), out(out_), row_stride(row_stride_), col_stride(col_stride_) {
    if (col_stride != 1 && row_stride == 1) {
      row_stride = col_stride;
      col_stride = 1;
    }
  }

  // The first n lanes of v, already scaled, into row i from column j on, where columns are contiguous.
  inline __attribute__((always_inline)) void vector(int64_t i, int64_t j, Vector<T> v, int64_t n) const {
    T* to = out + i * row_stride + j;
    if (n < kLanes<T>) {
      store_first(to, write == Write::add ? decay * load_first(to, n) + v : v, n);
    } else if constexpr (write == Write::add) {
      store(to, decay * load(to) + v);
    } else if constexpr (write == Write::stream) {
      store_past_caches(to, v);
    } else {
      store(to, v);
    }
  }

  // The same for any strides.
  inline __attribute__((always_inline)) void entry(int64_t i, int64_t j, T value) const {
    T* to = out + i * row_stride + j * col_stride;
    *to = write == Write::add ? decay * *to + value : value;
  }
};

// Calls f with the Merge of these; `height` rows of out are about to be written, up to as many columns.
template <class T, class F>
static inline void with_merge(int64_t height, T decay, T scale, T* out, int64_t row_stride, int64_t col_stride, F f) {
  const Merge<T, Write::plain> plain(decay, scale, out, row_stride, col_stride);
  if (decay != T(0)) return f(Merge<T, Write::add>(decay, scale, out, row_stride, col_stride));
  if constexpr (kStoresPastCaches) {
    const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 && plain.row_stride % kLanes<T> == 0;
    const int64_t bytes = height * height * static_cast<int64_t>(sizeof(T));
    if (aligned && plain.col_stride == 1 && bytes >= kStreamBytes) {
      f(Merge<T, Write::stream>(decay, scale, out, row_stride, col_stride));
      return stores_done();
    }
  }
  f(plain);
}

// Lane numbers 0, 1, ... as values of T.
template <class T>
static inline Vector<T> lane_numbers() {
  Vector<T> v = {};
  for (int i = 0; i < static_cast<int>(kLanes<T>); ++i) v[i] = static_cast<T>(i);
  return v;
}

// Up to a square of lanes x lanes sums, rows from i and columns from j on, and its mirror image. at(r) is row i + r of
// the sums, columns from j on; it is asked for existing rows only. Sums on both sides of the diagonal: only
// those below and on it are used. `rows` and `columns` say how many exist.
template <class T, Write write, class At>
static inline __attribute__((always_inline)) void write_square(const Merge<T, write>& merge, int64_t i, int64_t j,
                                                               int64_t rows, int64_t columns, At at) {
  constexpr int lanes = static_cast<int>(kLanes<T>);
  Vector<T> v[lanes], across[lanes];
  if (rows >= lanes) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) v[r] = across[r] = merge.scale * at(r);
  } else {
    for (int r = 0; r < lanes; ++r) v[r] = across[r] = r < rows ? merge.scale * at(r) : Vector<T>{};
  }
  transpose<T>(across);
  if (i == j) {
    const Vector<T> lane = lane_numbers<T>();
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) v[r] = lane <= static_cast<T>(r) - Vector<T>{} ? v[r] : across[r];
    for (int64_t r = 0; r < smaller(rows, lanes); ++r) merge.vector(i + r, j, v[r], columns);
    return;
  }
  if (rows >= lanes && columns >= lanes) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) merge.vector(i + r, j, v[r], lanes);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) merge.vector(j + r, i, across[r], lanes);
    return;
  }
  for (int64_t r = 0; r < smaller(rows, lanes); ++r) merge.vector(i + r, j, v[r], columns);
  for (int64_t r = 0; r < smaller(columns, lanes); ++r) merge.vector(j + r, i, across[r], rows);
}

// The same as write_block, entry by entry.
template <class T, Write write, class At>
static void write_entries(const Merge<T, write>& merge, int64_t row0, int64_t row1, int64_t col0, int64_t col1, At at) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = row0; i < row1; ++i) {
    for (int64_t j = col0; j < smaller(col1, i + 1); j += lanes) {
      const Vector<T> v = merge.scale * at(i, j);
      for (int64_t s = 0; s < smaller(lanes, smaller(col1, i + 1) - j); ++s) {
        merge.entry(i, j + s, v[s]);
        if (j + s != i) merge.entry(j + s, i, v[s]);
      }
    }
  }
}

// Rows [row0, row1) and columns [col0, col1) of a triangle of sums, and their mirror image; entries above the diagonal
// are left out. col0 is a multiple of the lanes. at(i, j) is the vector of sums of row i from column j on,
// of which lanes right of the diagonal may be anything.
template <class T, Write write, class At>
static void write_block(const Merge<T, write>& merge, int64_t row0, int64_t row1, int64_t col0, int64_t col1, At at) {
  constexpr int64_t lanes = kLanes<T>;
  if (merge.col_stride == 1) {
    for (int64_t i = row0; i < row1;) {
      const int64_t end = smaller(row1, (i / lanes + 1) * lanes);
      int64_t j = col0;
      for (; j < smaller(col1, i % lanes == 0 ? end : i - lanes + 1); j += lanes) {
        write_square(merge, i, j, end - i, smaller(col1, end) - j, [&](int64_t r) { return at(i + r, j); });
      }
      if (j < smaller(col1, end)) write_entries(merge, i, end, j, col1, at);
      i = end;
    }
    return;
  }
  write_entries(merge, row0, row1, col0, col1, at);
}

}  // namespace kronfac::kernels::KRONFAC_ISA
