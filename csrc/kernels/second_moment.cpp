#include "kernels/second_moment.h"

#include <cstddef>

#include "kernels/tile.h"
#include "kernels/tile_rows.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Products over more positions than this are summed in runs of it, which bounds the rounding error of float32 sums.
constexpr int64_t kRun = 512;

// As many examples are packed at a time as make up one cache block of a matrix product, and one at least.
template <class T>
int64_t group_size(int64_t examples, int64_t positions) {
  return smaller(examples, larger(1, blocks_of<T>().kc / larger(1, positions)));
}

// Element counts of the three parts of scratch: sums, packed g, packed x. One position per example is a plain product
// of squares whose sum runs over examples, packed kc at a time.
template <class T>
struct Layout {
  int64_t ld, sums, left, right;
  Layout(int64_t rows, int64_t columns, int64_t positions) {
    constexpr Blocks block = blocks_of<T>();
    const int64_t packed_k = larger(block.kc, positions);
    ld = round_up(columns, block.nr);
    sums = round_up(round_up(rows, block.mr) * ld, panel_alignment);
    left = round_up(packed_k * round_up(rows, block.nr), panel_alignment);
    right = packed_k * ld;
  }
};

template <class T>
int64_t scratch(int64_t rows, int64_t columns, int64_t positions) {
  const Layout<T> layout(rows, columns, positions);
  return (layout.sums + layout.left + layout.right) * static_cast<int64_t>(sizeof(T));
}

// Rows that are read in place are fetched so far ahead: the time of a memory access in terms of tile steps.
constexpr int64_t kAhead = 32;

// sums tile += (a^T b)^2 over the positions of one example; run(t0, count, write) forms the product of some positions.
template <class T, class Run>
void add_square(int64_t positions, T* sums, int64_t ld, Run run) {
  constexpr Blocks block = blocks_of<T>();
  if (positions <= kRun) {
    run(0, positions, [=](int r, int64_t s, Vector<T> v) {
      T* out = sums + r * ld + s;
      store(out, load(out) + v * v);
    });
    return;
  }
  alignas(panel_alignment) T product[block.mr * block.nr] = {};
  for (int64_t t = 0; t < positions; t += kRun) {
    run(t, smaller(kRun, positions - t), [&](int r, int64_t s, Vector<T> v) {
      T* out = product + r * block.nr + s;
      store(out, load(out) + v);
    });
  }
  for (int r = 0; r < block.mr; ++r) {
    for (int s = 0; s < block.nr; ++s) sums[r * ld + s] += product[r * block.nr + s] * product[r * block.nr + s];
  }
}

template <class T>
void add_square_of_panels(int64_t positions, const T* a, const T* b, T* sums, int64_t ld) {
  constexpr int64_t width = blocks_of<T>().nr;
  add_square(positions, sums, ld,
             [=](int64_t t, int64_t count, auto write) { Tile<T>::run(count, a + t * width, b + t * width, write); });
}

template <class T>
void add_square_of_rows(int64_t positions, const Rows<T>& a, const Rows<T>& b, T* sums, int64_t ld) {
  constexpr int mr = blocks_of<T>().mr;
  add_square(positions, sums, ld, [=](int64_t t, int64_t count, auto write) {
    const Rows<T> left{a.data + t * a.stride, a.stride}, right{b.data + t * b.stride, b.stride};
    const auto fetch = [right](int64_t k) {
      const T* row = right.data + (k + kAhead) * right.stride;
      for (int v = 0; v < kPanelVectors<T>; ++v) __builtin_prefetch(row + v * kLanes<T>);
    };
    tile_of_rows<T, mr, kPanelVectors<T>>(count, left, right, fetch, write);
  });
}

template <class T>
constexpr Element kElement = sizeof(T) == sizeof(float) ? Element::f32 : Element::f64;

// Whether tiles can read the rows of an operand where they lie.
template <class T>
bool in_rows(const Matrix& matrix) {
  return matrix.type == kElement<T> && matrix.col_stride == 1;
}

Matrix example(const Examples& all, int64_t n) {
  Matrix matrix = all.matrix;
  visit(matrix.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    matrix.data = static_cast<const S*>(matrix.data) + n * all.example_stride;
  });
  return matrix;
}

// Row n of the result is the single position of example n.
Matrix across_examples(const Examples& all) {
  Matrix matrix = all.matrix;
  matrix.row_stride = all.example_stride;
  return matrix;
}

template <class T>
void block(const Examples& g, const Examples& x, int64_t examples, int64_t positions, int64_t row0, int64_t row1,
           int64_t col0, int64_t col1, T decay, T scale, T* out, int64_t row_stride, int64_t col_stride, void* memory) {
  constexpr Blocks size = blocks_of<T>();
  const int64_t rows = row1 - row0, columns = col1 - col0;
  const Layout<T> layout(rows, columns, positions);
  const int64_t ld = layout.ld;
  T* sums = static_cast<T*>(memory);
  T *left = sums + layout.sums, *right = left + layout.left;
  __builtin_memset(sums, 0, static_cast<size_t>(layout.sums) * sizeof(T));

  if (positions == 1) {
    const Matrix all_g = across_examples(g), all_x = across_examples(x);
    const auto square = [](T v) { return v * v; };
    for (int64_t n = 0; n < examples; n += size.kc) {
      const int64_t kc = smaller(size.kc, examples - n);
      pack_matrix_panels<T>(all_g, n, kc, row0, rows, left, square);
      pack_with_ones<T>(all_x, x.features, n, kc, col0, columns, right, square);
      for (int64_t j = 0; j < columns; j += size.nr) {
        for (int64_t i = 0; i < rows; i += size.mr) {
          T* tile = sums + i * ld + j;
          Tile<T>::run(kc, packed_column(left, kc, i), right + j * kc,
                       [&](int r, int64_t s, Vector<T> v) { store(tile + r * ld + s, load(tile + r * ld + s) + v); });
        }
      }
    }
  } else if (positions > 1) {
    const auto same = [](T v) { return v; };
    const int64_t group = group_size<T>(examples, positions);
    const int64_t left_size = positions * round_up(rows, size.nr), right_size = positions * ld;
    // Few rows of the result meet each entry of x too seldom to pay for packing it: whole panels are then read in
    // place.
    const bool few = rows <= size.nr && rows % size.mr == 0 && in_rows<T>(g.matrix) && in_rows<T>(x.matrix);
    const int64_t unpacked = few ? larger(0, smaller(columns, x.features - col0)) / size.nr * size.nr : 0;
    for (int64_t n = 0; n < examples; n += group) {
      const int64_t members = smaller(group, examples - n);
      for (int64_t e = 0; e < members; ++e) {
        const Matrix left_rows = example(g, n + e), right_rows = example(x, n + e);
        if (unpacked < columns) {
          pack_matrix_panels<T>(left_rows, 0, positions, row0, rows, left + e * left_size, same);
          pack_with_ones<T>(right_rows, x.features, 0, positions, col0 + unpacked, columns - unpacked,
                            right + e * right_size + unpacked * positions, same);
        }
        const Rows<T> a{static_cast<const T*>(left_rows.data) + row0, left_rows.row_stride};
        const Rows<T> b{static_cast<const T*>(right_rows.data) + col0, right_rows.row_stride};
        for (int64_t j = 0; j < unpacked; j += size.nr) {
          for (int64_t i = 0; i < rows; i += size.mr) {
            add_square_of_rows<T>(positions, {a.data + i, a.stride}, {b.data + j, b.stride}, sums + i * ld + j, ld);
          }
        }
      }
      for (int64_t j = unpacked; j < columns; j += size.nr) {
        for (int64_t i = 0; i < rows; i += size.mr) {
          for (int64_t e = 0; e < members; ++e) {
            add_square_of_panels(positions, packed_column(left + e * left_size, positions, i),
                                 right + e * right_size + j * positions, sums + i * ld + j, ld);
          }
        }
      }
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    T* row = out + (row0 + i) * row_stride + col0 * col_stride;
    for (int64_t j = 0; j < columns; ++j) {
      T* entry = row + j * col_stride;
      *entry = decay == T(0) ? scale * sums[i * ld + j] : decay * *entry + scale * sums[i * ld + j];
    }
  }
}

}  // namespace

extern const SecondMomentKernels<float> second_moment_f32;
extern const SecondMomentKernels<double> second_moment_f64;
const SecondMomentKernels<float> second_moment_f32{scratch<float>, block<float>};
const SecondMomentKernels<double> second_moment_f64{scratch<double>, block<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
