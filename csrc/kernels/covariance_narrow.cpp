#include "kernels/covariance_narrow.h"

#include "kernels/symmetric_update.h"
#include "kernels/tile_rows.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Rows of one run take so much at most: they are read once for every tile and stay in an L1 of 32 KiB or more.
constexpr int64_t kRunBytes = 20 << 10;

// sum (R, V vectors) += the product of columns [i, i + R) with the V vectors of columns from j on; := for `first`. The
// run after this one is fetched meanwhile, a cache line for each row and tile: the tiles of a run begin in all its
// lines.
template <class T, int R, int V>
void add_tile(const Rows<T>& rows, int64_t nk, int64_t i, int64_t j, bool first, T* sum, int64_t ld) {
  const T* next = rows.data + i + nk * rows.stride;
  tile_of_rows<T, R, V>(
      nk, {rows.data + i, rows.stride}, {rows.data + j, rows.stride},
      [=](int64_t k) { __builtin_prefetch(next + k * rows.stride); },
      [=](int r, int64_t s, Vector<T> v) {
        T* to = sum + (i + r) * ld + j + s;
        store(to, first ? v : load(to) + v);
      });
}

// The same for 0 < vectors <= V.
template <class T, int R, int V>
void add_tile(int64_t vectors, const Rows<T>& rows, int64_t nk, int64_t i, int64_t j, bool first, T* sum, int64_t ld) {
  if constexpr (V > 1) {
    if (vectors < V) return add_tile<T, R, V - 1>(vectors, rows, nk, i, j, first, sum, ld);
  }
  add_tile<T, R, V>(rows, nk, i, j, first, sum, ld);
}

// How far a tile reads past the first of a row's columns, and what a packed row takes.
template <class T>
int64_t reach(int64_t columns) {
  constexpr int64_t lanes = kLanes<T>, mr = blocks_of<T>().mr;
  return round_up(columns, lanes > mr ? lanes : mr);
}

// Rows [row0, columns) of the triangle over one run, every entry of which can be read up to its reach. `sum` is where
// row 0 would be.
template <class T>
void add_run(const Rows<T>& rows, int64_t nk, int64_t row0, int64_t columns, bool first, T* sum, int64_t ld) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int mr = blocks_of<T>().mr, across = kPanelVectors<T>;
  for (int64_t i = row0; i < columns;) {
    // Two blocks of rows that need no more than one vector are formed at once: one block's sums alone are too few to
    // hide the latency of the additions.
    if (i + mr < columns && i + 2 * mr <= lanes) {
      if (i + mr + mr / 2 >= columns) {
        add_tile<T, mr + mr / 2, 1>(rows, nk, i, 0, first, sum, ld);
      } else {
        add_tile<T, 2 * mr, 1>(rows, nk, i, 0, first, sum, ld);
      }
      i += 2 * mr;
      continue;
    }
    const int64_t needed = (smaller(i + mr, columns) - 1) / lanes + 1;
    for (int64_t v = 0; v < needed; v += across) {
      add_tile<T, mr, across>(smaller(across, needed - v), rows, nk, i, v * lanes, first, sum, ld);
    }
    i += mr;
  }
}

// Rows [k0, k0 + nk) of [x 1] as T, each `width` long, whatever stands behind the columns.
template <class T>
void pack_rows(const CovarianceInput& input, int64_t columns, int64_t k0, int64_t nk, int64_t width, T* packed) {
  const Matrix& x = input.x;
  const int64_t stored = smaller(columns, input.features);
  visit(x.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    const S* from = static_cast<const S*>(x.data) + k0 * x.row_stride;
    if (x.col_stride == 1) {
      for (int64_t k = 0; k < nk; ++k) {
        const S* row = from + k * x.row_stride;
        T* to = packed + k * width;
        for (int64_t j = 0; j < stored; ++j) to[j] = convert<T>(row[j]);
      }
    } else {
      for (int64_t j = 0; j < stored; ++j) {
        const S* column = from + j * x.col_stride;
        for (int64_t k = 0; k < nk; ++k) packed[k * width + j] = convert<T>(column[k * x.row_stride]);
      }
    }
  });
  for (int64_t k = 0; k < nk; ++k) {
    for (int64_t j = stored; j < width; ++j) packed[k * width + j] = T(j < columns);
  }
}

template <class T>
constexpr Element kElement = sizeof(T) == sizeof(float) ? Element::f32 : Element::f64;

template <class T>
void update_narrow(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, T* sum, int64_t ld,
                   void* scratch) {
  const int64_t columns = row1, width = reach<T>(columns);
  T* packed = static_cast<T*>(scratch);
  T* run_sum = packed + packed_elements<T>(k1 - k0, columns);
  if (k0 >= k1) return update<T>({nullptr, nullptr}, k0, k1, row0, row1, sum, ld, scratch);
  // As many rows as suit L1, and no more than scratch has room for.
  const int64_t longest = smaller(blocks_of<T>().kc, kRunBytes / (width * static_cast<int64_t>(sizeof(T))));
  // Rows are read in place up to the last whose reach ends inside the matrix: vectors pass over the end of a row into
  // the next, which spoils sums that nobody reads.
  const Matrix& x = input.x;
  int64_t in_place = k0;
  if (x.type == kElement<T> && x.col_stride == 1 && x.row_stride >= columns && columns <= input.features) {
    in_place = larger(k0, k1 - (width - columns + x.row_stride - 1) / x.row_stride);
  }
  for (int64_t start = k0; start < k1; start += kRunLength) {
    const int64_t end = smaller(k1, start + kRunLength);
    T* to = start == k0 ? sum : run_sum;
    const int64_t to_ld = start == k0 ? ld : round_up(columns, blocks_of<T>().nr);
    for (int64_t k = start; k < end;) {
      const bool direct = k < in_place;
      const int64_t nk = smaller(longest, (direct ? smaller(in_place, end) : end) - k);
      Rows<T> rows{packed, width};
      if (direct) {
        rows = {static_cast<const T*>(x.data) + k * x.row_stride, x.row_stride};
      } else {
        pack_rows<T>(input, columns, k, nk, width, packed);
      }
      add_run<T>(rows, nk, row0, columns, k == start, to - row0 * to_ld, to_ld);
      k += nk;
    }
    if (to == sum) continue;
    for (int64_t i = row0; i < columns; ++i) {
      T* total = sum + (i - row0) * ld;
      const T* part = run_sum + (i - row0) * to_ld;
      for (int64_t j = 0; j <= i; ++j) total[j] += part[j];
    }
  }
}

}  // namespace

void covariance_narrow_f32(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, float* sum,
                           int64_t ld, void* scratch) {
  update_narrow<float>(input, k0, k1, row0, row1, sum, ld, scratch);
}
void covariance_narrow_f64(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1,
                           double* sum, int64_t ld, void* scratch) {
  update_narrow<double>(input, k0, k1, row0, row1, sum, ld, scratch);
}

}  // namespace kronfac::kernels::KRONFAC_ISA
