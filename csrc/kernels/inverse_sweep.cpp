#include "kernels/inverse_sweep.h"

#include "kernels/gemm_pack.h"
#include "kernels/gemm_tile.h"
#include "kernels/pivot_block.h"
#include "kernels/split.h"
#include "kernels/tile.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// What is cut how. Pivots of a block are a multiple of a panel's width, so that a panel lies wholly on one side of it:
// with longer sums the matrix would be read and written less often, but they cost order^2 / 2 multiply-adds for each
// pivot more, and rounding.
struct Cut {
  int64_t pivots;
  int64_t width;          // of a panel
  int64_t tile, padding;  // rows that are updated together, and what their number is rounded up to
};
template <class T>
constexpr Cut kCut{48, blocks_of<T>().nr, blocks_of<T>().mr, blocks_of<T>().mr};
#ifdef KRONFAC_SPLIT
// Two steps of terms on the matrix units.
template <>
constexpr Cut kCut<float>{2 * kStepTerms, kBlock, kBlock, kStripLines};
#endif

template <class T>
constexpr int64_t kPivots = kCut<T>.pivots;
// Of a matrix beyond the caches, which every block reads and writes as a whole.
template <class T>
constexpr int64_t kLargePivots = 2 * kPivots<T>;
template <class T>
constexpr int64_t kWidth = kCut<T>.width;
template <class T>
constexpr int64_t kMr = blocks_of<T>().mr;

template <class T>
int64_t padded_rows(int64_t n) {
  return round_up(n, kCut<T>.padding);
}

// Rows are whole cache lines; a multiple of a power of two would put the rows of a tile into the same few sets of L1.
template <class T>
int64_t stride(int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t columns = round_up(n, kWidth<T>), entries = round_up(columns, line);
  return entries % (8 * line) == 0 ? entries + line : entries;
}

template <class T>
int64_t workspace_bytes(int64_t n) {
  return padded_rows<T>(n) * stride<T>(n) * static_cast<int64_t>(sizeof(T));
}

// First column right of what the tile that row i lies in touches.
template <class T>
constexpr int64_t touched(int64_t i) {
  return round_up(i / kCut<T>.tile * kCut<T>.tile + kCut<T>.tile, kLanes<T>);
}

template <class S, class T>
bool load_rows(const S* f, int64_t row_stride, int64_t col_stride, int64_t n, double damping, int64_t row0,
               int64_t row1, T* work) {
  constexpr int64_t lanes = kLanes<S>;
  constexpr int64_t kTile = 16;  // 16 x 16 floats are 16 cache lines on either side, where f is column-major
  constexpr int64_t ahead = 4;   // rows: every one ends at the diagonal, where the hardware does not expect it to
  const int64_t ld = stride<T>(n);
  const T shift = static_cast<T>(damping);
  Vector<S> defect{};
  int bad = 0;
  for (int64_t ib = row0; ib < row1; ib += kTile) {
    const int64_t ie = smaller(ib + kTile, row1);
    if (col_stride == 1) {
      for (int64_t i = ib; i < ie; ++i) {
        const S* source = f + i * row_stride;
        T* target = work + i * ld;
        int64_t j = 0;
        for (; j + lanes <= i + 1; j += lanes) {
          const Vector<S> v = load(source + j);
          __builtin_prefetch(source + ahead * row_stride + j);
          defect += v - v;
          store_as<S>(target + j, -v);
        }
        if (j <= i && j + lanes <= ld) {  // with zeros right of the diagonal
          const Vector<S> v = load_first(source + j, i + 1 - j);
          defect += v - v;
          store_as<S>(target + j, -v);
        } else {
          for (; j <= i; ++j) {
            target[j] = -static_cast<T>(source[j]);
            bad |= not_finite(source[j]);
          }
        }
      }
    } else {
      for (int64_t jb = 0; jb < ie; jb += kTile) {
        for (int64_t i = ib; i < ie; ++i) {
          const S* source = f + i * row_stride;
          T* target = work + i * ld;
          for (int64_t j = jb; j < smaller(jb + kTile, i + 1); ++j) {
            const S value = source[j * col_stride];
            target[j] = -static_cast<T>(value);
            bad |= not_finite(value);
          }
        }
      }
    }
  }
  for (int64_t i = row0; i < row1; ++i) {
    T* row = work + i * ld;
    row[i] -= shift;
    for (int64_t j = i + 1; j < smaller(touched<T>(i), ld); ++j) row[j] = 0;
  }
  if (row1 == n) {
    for (int64_t i = n; i < padded_rows<T>(n); ++i) {
      for (int64_t j = 0; j < smaller(touched<T>(i), ld); ++j) work[i * ld + j] = 0;
    }
  }
  return bad == 0 && all_zero<S>(defect);
}

// Row by row of x, so that it is written in order: of the two, the workspace is the one that is in cache.
template <class S, class T>
bool unload_rows(const T* work, int64_t n, int64_t row0, int64_t row1, S* x) {
  constexpr int64_t lanes = kLanes<S>;
  static_assert(kPivots<T> % lanes == 0);
  constexpr int64_t ahead = 4 * lanes;  // entries of each row that are on their way from memory
  const int64_t ld = stride<T>(n);
  const auto at = [&](int64_t i, int64_t j) { return load_as<S>(work + i * ld + j); };
  Vector<S> defect{};
  int bad = 0;
  for (int64_t ib = row0; ib < row1; ib += lanes) {
    const int64_t ie = smaller(ib + lanes, row1);
    for (int64_t jb = 0; jb < n; jb += lanes) {
      S* to = x + ib * n + jb;
      for (int64_t i = 0; i < ie - ib; ++i) __builtin_prefetch(to + i * n + ahead, 1);
      if (jb < ib) {
        for (int64_t i = 0; i < ie - ib; ++i) {
          const Vector<S> v = at(ib + i, jb);
          defect += v - v;
          store(to + i * n, v);
        }
      } else if (jb == ib) {
        for (int64_t i = ib; i < ie; ++i) {
          for (int64_t j = ib; j <= i; ++j) {
            const S value = static_cast<S>(work[i * ld + j]);
            x[i * n + j] = value;
            x[j * n + i] = value;
            bad |= not_finite(value);
          }
        }
      } else {  // above the diagonal, where a block of rows is whole
        const int64_t columns = smaller(lanes, n - jb);
        Vector<S> v[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) v[i] = i < columns ? at(jb + i, ib) : Vector<S>{};
        transpose<S>(v);
        if (columns == lanes) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < lanes; ++i) store(to + i * n, v[i]);
        } else {
          for (int64_t i = 0; i < lanes; ++i) store_first(to + i * n, v[i], columns);
        }
      }
    }
  }
  return bad == 0 && all_zero<S>(defect);
}

template <class T, int64_t pivots>
int32_t pivot(const T* work, int64_t n, int64_t k0, int64_t count, T* w) {
  constexpr int64_t leaf = pivots <= kLeaf ? kLeaf : 2 * kLeaf;
  static_assert(pivots <= leaf);
  alignas(64) Real u[leaf * leaf];
  alignas(64) Real inverse[leaf * leaf];
  constexpr int64_t lanes = kLanes<T>;
  static_assert(pivots % lanes == 0);
  const int64_t ld = stride<T>(n), padded = pad<leaf>(u, count);
  const T* block = work + k0 * ld + k0;
  for (int64_t ib = 0; ib < count; ib += lanes) {
    for (int64_t jb = 0; jb <= ib; jb += lanes) {
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) v[i] = ib + i < count ? load(block + (ib + i) * ld + jb) : Vector<T>{};
      transpose<T>(v);
      const int64_t rows = smaller(lanes, count - jb);
      for (int64_t j = 0; j < rows; ++j) store_as<T>(u + (jb + j) * leaf + ib, -v[j]);
    }
  }
  if (const int32_t info = invert_root<leaf>(u, inverse, padded)) return info;
  // Right of its diagonal the inverse is zero.
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < pivots; j += lanes) store(w + i * pivots + j, load_as<T>(inverse + i * leaf + j));
  }
  for (int64_t at = count * pivots; at < pivots * pivots; ++at) w[at] = 0;
  return 0;
}

// Columns j0 <= j < j0 + width of Y^T, count rows.
template <class T, int64_t pivots>
void panel_of(const T* work, int64_t n, int64_t k0, int64_t count, const T* w, int64_t j0, T* panel) {
  constexpr int64_t mr = kMr<T>, width = kWidth<T>;
  static_assert(pivots % width == 0 && pivots % mr == 0);
  const int64_t ld = stride<T>(n);
  if (j0 >= k0 && j0 < k0 + pivots) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < width; ++j) panel[k * width + j] = w[k * pivots + j0 - k0 + j];
    }
    return;
  }
  // Left of the block its own rows are the panel; below, rows have to be turned into one.
  alignas(panel_alignment) T transposed[pivots * width];
  const bool left = j0 < k0;
  if (!left) {
    pack_panel<T, width>(work + j0 * ld + k0, 1, ld, count, smaller(width, padded_rows<T>(n) - j0), transposed);
  }
  const T* right = left ? work + k0 * ld + j0 : transposed;
  const TileKernel<T> kernel = kTileKernels<T, true>(mr, width / kLanes<T>);
  for (int64_t r = 0; r < count; r += mr) {
    kernel(smaller(r + mr, count), {w + r * pivots, pivots, right, left ? ld : width, right, 0, T(1), T(0),
                                    panel + r * width, width, kLanes<T>});
  }
}

// Products on the vector units: Y^T panel by panel, (pivots, width) each.
template <class T, int64_t pivots>
struct VectorUpdate {
  static int64_t panel_bytes(int64_t n) { return round_up(n, kWidth<T>) * pivots * static_cast<int64_t>(sizeof(T)); }
  static void panels(const T* work, int64_t n, int64_t k0, int64_t count, const T* w, int64_t p0, int64_t p1, void* y);
  static void update(T* work, int64_t n, int64_t k0, int64_t count, const void* y, int64_t row0, int64_t row1);
};

template <class T, int64_t pivots>
void VectorUpdate<T, pivots>::panels(const T* work, int64_t n, int64_t k0, int64_t count, const T* w, int64_t p0,
                                     int64_t p1, void* y) {
  constexpr int64_t width = kWidth<T>;
  for (int64_t p = p0; p < p1; ++p)
    panel_of<T, pivots>(work, n, k0, count, w, p * width, static_cast<T*>(y) + p * width * pivots);
}

template <class T, int vectors>
inline void add_tile(int64_t count, const T* a, const T* b, bool overwrite, T* out, int64_t ld) {
#pragma GCC unroll 16
  for (int i = 0; i < static_cast<int>(kMr<T>); ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(out + i * ld + j * kLanes<T>, 1);
  }
  if (overwrite) {
    Tile<T, vectors>::run(count, a, b, [&](int i, int64_t j, Vector<T> v) { store(out + i * ld + j, v); });
  } else {
    Tile<T, vectors>::run(count, a, b,
                          [&](int i, int64_t j, Vector<T> v) { store(out + i * ld + j, load(out + i * ld + j) + v); });
  }
}

// The same for the first `needed` vectors only.
template <class T, int vectors = static_cast<int>(kWidth<T> / kLanes<T>)>
inline void add_tile(int64_t needed, int64_t count, const T* a, const T* b, bool overwrite, T* out, int64_t ld) {
  if constexpr (vectors > 1) {
    if (needed < vectors) return add_tile<T, vectors - 1>(needed, count, a, b, overwrite, out, ld);
  }
  add_tile<T, vectors>(count, a, b, overwrite, out, ld);
}

template <class T, int64_t pivots>
void VectorUpdate<T, pivots>::update(T* work, int64_t n, int64_t k0, int64_t count, const void* y, int64_t row0,
                                     int64_t row1) {
  constexpr int64_t mr = kMr<T>, width = kWidth<T>;
  const int64_t ld = stride<T>(n);
  const T* panels = static_cast<const T*>(y);
  const auto inside = [&](int64_t i) { return i >= k0 && i < k0 + pivots; };
  for (int64_t j = 0; j < row1; j += width) {
    for (int64_t i = larger(row0, j); i < row1; i += mr) {
      const int64_t needed = smaller(width, touched<T>(i) - j) / kLanes<T>;
      add_tile<T>(needed, count, panels + i / width * width * pivots + i % width, panels + j * pivots,
                  inside(i) || inside(j), work + i * ld + j, ld);
    }
  }
}

#ifdef KRONFAC_SPLIT
// Products on the matrix units: all left strips of Y, then all right ones.
template <int64_t pivots>
struct SplitUpdate {
  // The block that comes next is on its way while its products are computed: rows are too far apart for the hardware
  // to foresee, and at order 4608, where the matrix is larger than the caches, waiting took a third of the time.
  static void prefetch_block(const float* out, int64_t ld) {
    for (int64_t r = 0; r < kBlock; ++r) {
      __builtin_prefetch(out + r * ld, 1);
      __builtin_prefetch(out + r * ld + kStripLines, 1);
    }
  }

  static int64_t side_bytes(int64_t n, int64_t count) {
    return round_up(n, kWidth<float>) / kStripLines * strip_bytes(count, kFloatParts);
  }
  static int64_t panel_bytes(int64_t n) { return 2 * side_bytes(n, pivots); }

  static void panels(const float* work, int64_t n, int64_t k0, int64_t count, const float* w, int64_t p0, int64_t p1,
                     void* y) {
    constexpr int64_t width = kWidth<float>;
    alignas(panel_alignment) float panel[pivots * width];
    const int64_t bytes = width / kStripLines * strip_bytes(count, kFloatParts);
    for (int64_t p = p0; p < p1; ++p) {
      panel_of<float, pivots>(work, n, k0, count, w, p * width, panel);
      char* left = static_cast<char*>(y) + p * bytes;
      pack_lines<kFloatParts>(panel, width, count, width, left, left + side_bytes(n, count));
    }
  }

  static void update(float* work, int64_t n, int64_t k0, int64_t count, const void* y, int64_t row0, int64_t row1) {
    const int64_t ld = stride<float>(n), bytes = strip_bytes(count, kFloatParts);
    const char* left = static_cast<const char*>(y);
    const auto inside = [&](int64_t i) { return i >= k0 && i < k0 + pivots; };
    const int64_t end = round_up(row1, kStripLines);
    const Tiles tiles;
    multiply_chunk<kFloatParts>(end - row0, end, count, left + row0 / kStripLines * bytes, left + side_bytes(n, count),
                                row0, [&](const float* block, int64_t i, int64_t j, int64_t rows, int64_t columns) {
                                  const float keep = inside(row0 + i) || inside(j) ? 0 : 1;
                                  float* out = work + (row0 + i) * ld + j;
                                  const bool last = i + kBlock >= end - row0;
                                  prefetch_block(last ? out - i * ld + kBlock : out + kBlock * ld, ld);
                                  for (int64_t r = 0; r < rows; ++r)
                                    merge_row(block + r * kBlock, columns, 1, keep, out + r * ld);
                                });
  }
};
#endif

template <class T, int64_t block_pivots, class Update>
constexpr SweepKernels<T> kernels_of{.stride = stride<T>,
                                     .workspace_bytes = workspace_bytes<T>,
                                     .panel_bytes = Update::panel_bytes,
                                     .pivots = block_pivots,
                                     .width = kWidth<T>,
                                     .pivot = pivot<T, block_pivots>,
                                     .panels = Update::panels,
                                     .update = Update::update};

#ifdef KRONFAC_SPLIT
template <int64_t pivots>
using UpdateF32 = SplitUpdate<pivots>;
#else
template <int64_t pivots>
using UpdateF32 = VectorUpdate<float, pivots>;
#endif

}  // namespace

const SweepKernels<float> sweep_f32 = kernels_of<float, kPivots<float>, UpdateF32<kPivots<float>>>;
const SweepKernels<float> large_sweep_f32 = kernels_of<float, kLargePivots<float>, UpdateF32<kLargePivots<float>>>;
const SweepKernels<double> sweep_f64 = kernels_of<double, kPivots<double>, VectorUpdate<double, kPivots<double>>>;
const SweepKernels<double> large_sweep_f64 =
    kernels_of<double, kLargePivots<double>, VectorUpdate<double, kLargePivots<double>>>;
const SweepCopies<float, float> sweep_copies_f32{load_rows<float, float>, unload_rows<float, float>};
const SweepCopies<double, double> sweep_copies_f64{load_rows<double, double>, unload_rows<double, double>};
const SweepCopies<float, double> sweep_copies_f32_in_f64{load_rows<float, double>, unload_rows<float, double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
