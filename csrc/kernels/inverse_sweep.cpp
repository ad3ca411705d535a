#include "kernels/inverse_sweep.h"

#include "kernels/gemm_pack.h"
#include "kernels/gemm_tile.h"
#include "kernels/pivot_block.h"
#include "kernels/tile.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

constexpr int64_t kBlock = kSweepBlock;

template <class T>
constexpr int64_t kMr = blocks_of<T>().mr;
template <class T>
constexpr int64_t kNr = blocks_of<T>().nr;

// Rows are whole cache lines; a multiple of a power of two would put the rows of a tile into the same few sets of L1.
template <class T>
int64_t stride(int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t columns = round_up(n, kNr<T>), entries = round_up(columns, line);
  return entries % (8 * line) == 0 ? entries + line : entries;
}

template <class T>
int64_t workspace_bytes(int64_t n) {
  return round_up(n, kMr<T>) * stride<T>(n) * static_cast<int64_t>(sizeof(T));
}

template <class T>
int64_t panel_bytes(int64_t n) {
  return round_up(n, kNr<T>) * kBlock * static_cast<int64_t>(sizeof(T));
}

// First column right of what a tile of rows beginning at `tile` touches.
template <class T>
constexpr int64_t touched(int64_t tile) {
  return round_up(tile + kMr<T>, kLanes<T>);
}

template <class S, class T>
bool load_rows(const S* f, int64_t row_stride, int64_t col_stride, int64_t n, double damping, int64_t row0,
               int64_t row1, T* work) {
  constexpr int64_t lanes = kLanes<S>;
  constexpr int64_t kTile = 16;  // 16 x 16 floats are 16 cache lines on either side, where f is column-major
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
          defect += v - v;
          for (int64_t l = 0; l < lanes; ++l) target[j + l] = -static_cast<T>(v[l]);
        }
        for (; j <= i; ++j) {
          target[j] = -static_cast<T>(source[j]);
          bad |= not_finite(source[j]);
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
    for (int64_t j = i + 1; j < touched<T>(i / kMr<T> * kMr<T>); ++j) row[j] = 0;
  }
  if (row1 == n) {
    for (int64_t i = n; i < round_up(n, kMr<T>); ++i) {
      for (int64_t j = 0; j < touched<T>(i / kMr<T> * kMr<T>); ++j) work[i * ld + j] = 0;
    }
  }
  return bad == 0 && all_zero<S>(defect);
}

template <class S, class T>
bool unload_rows(const T* work, int64_t n, int64_t row0, int64_t row1, S* x) {
  constexpr int64_t lanes = kLanes<S>;
  const int64_t ld = stride<T>(n);
  Vector<S> defect{};
  int bad = 0;
  for (int64_t ib = row0; ib < row1; ib += lanes) {
    const int64_t ie = smaller(ib + lanes, row1);
    for (int64_t jb = 0; jb < ie; jb += lanes) {
      if (ie - ib == lanes && jb + lanes <= ib) {
        Vector<S> v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          const T* from = work + (ib + i) * ld + jb;
          if constexpr (sizeof(S) == sizeof(T)) {
            v[i] = load(from);
          } else {
            for (int64_t l = 0; l < lanes; ++l) v[i][l] = static_cast<S>(from[l]);
          }
          store(x + (ib + i) * n + jb, v[i]);
          defect += v[i] - v[i];
        }
        transpose<S>(v);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(x + (jb + i) * n + ib, v[i]);
        continue;
      }
      for (int64_t i = ib; i < ie; ++i) {
        for (int64_t j = jb; j < smaller(jb + lanes, i + 1); ++j) {
          const S value = static_cast<S>(work[i * ld + j]);
          x[i * n + j] = value;
          x[j * n + i] = value;
          bad |= not_finite(value);
        }
      }
    }
  }
  return bad == 0 && all_zero<S>(defect);
}

template <class T>
int32_t pivot(const T* work, int64_t n, int64_t k0, int64_t count, T* w) {
  alignas(64) Real u[kLeaf * kLeaf];
  alignas(64) Real inverse[kLeaf * kLeaf];
  const int64_t ld = stride<T>(n), padded = pad(u, count);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = work + (k0 + i) * ld + k0;
    for (int64_t j = 0; j <= i; ++j) u[j * kLeaf + i] = -static_cast<Real>(row[j]);
  }
  if (const int32_t info = invert_root(u, inverse, padded)) return info;
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t j = 0; j < kBlock; ++j)
      w[i * kBlock + j] = i < count && j < count ? static_cast<T>(inverse[i * kLeaf + j]) : T(0);
  }
  return 0;
}

// Rows of the workspace transposed into a panel: panel[k * NR + j] := N[j0 + j, k0 + k], zeros for rows that are not
// there.
template <class T>
void transpose_rows(const T* work, int64_t ld, int64_t rows, int64_t k0, int64_t count, int64_t j0, T* panel) {
  pack_panel<T, kNr<T>>(work + j0 * ld + k0, 1, ld, count, smaller(kNr<T>, rows - j0), panel);
}

template <class T>
void panels(const T* work, int64_t n, int64_t k0, int64_t count, const T* w, int64_t p0, int64_t p1, T* y) {
  constexpr int64_t mr = kMr<T>, nr = kNr<T>;
  static_assert(kBlock % nr == 0 && kBlock % mr == 0);
  alignas(panel_alignment) T transposed[kBlock * nr];
  const int64_t ld = stride<T>(n), rows = round_up(n, mr);
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t j0 = p * nr;
    T* panel = y + p * nr * kBlock;
    if (j0 >= k0 && j0 < k0 + kBlock) {
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t j = 0; j < nr; ++j) panel[k * nr + j] = w[k * kBlock + j0 - k0 + j];
      }
      continue;
    }
    // Left of the block its own rows are the panel; below, rows have to be turned into one.
    const bool left = j0 < k0;
    if (!left) transpose_rows(work, ld, rows, k0, count, j0, transposed);
    const T* right = left ? work + k0 * ld + j0 : transposed;
    const TileKernel<T> kernel = kTileKernels<T, true>(mr, kPanelVectors<T>);
    for (int64_t r = 0; r < count; r += mr) {
      kernel(smaller(r + mr, count),
             {w + r * kBlock, kBlock, right, left ? ld : nr, right, 0, T(1), T(0), panel + r * nr, nr, kLanes<T>});
    }
  }
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
template <class T, int vectors = kPanelVectors<T>>
inline void add_tile(int64_t needed, int64_t count, const T* a, const T* b, bool overwrite, T* out, int64_t ld) {
  if constexpr (vectors > 1) {
    if (needed < vectors) return add_tile<T, vectors - 1>(needed, count, a, b, overwrite, out, ld);
  }
  add_tile<T, vectors>(count, a, b, overwrite, out, ld);
}

template <class T>
void update(T* work, int64_t n, int64_t k0, int64_t count, const T* y, int64_t row0, int64_t row1) {
  constexpr int64_t mr = kMr<T>, nr = kNr<T>;
  const int64_t ld = stride<T>(n);
  const auto inside = [&](int64_t i) { return i >= k0 && i < k0 + kBlock; };
  for (int64_t j = 0; j < row1; j += nr) {
    for (int64_t i = larger(row0, j); i < row1; i += mr) {
      const int64_t needed = smaller(nr, touched<T>(i) - j) / kLanes<T>;
      add_tile<T>(needed, count, y + i / nr * nr * kBlock + i % nr, y + j * kBlock, inside(i) || inside(j),
                  work + i * ld + j, ld);
    }
  }
}

template <class T>
constexpr SweepKernels<T> kernels_of{.stride = stride<T>,
                                     .workspace_bytes = workspace_bytes<T>,
                                     .panel_bytes = panel_bytes<T>,
                                     .width = kNr<T>,
                                     .pivot = pivot<T>,
                                     .panels = panels<T>,
                                     .update = update<T>};

}  // namespace

const SweepKernels<float> sweep_f32 = kernels_of<float>;
const SweepKernels<double> sweep_f64 = kernels_of<double>;
const SweepCopies<float, float> sweep_copies_f32{load_rows<float, float>, unload_rows<float, float>};
const SweepCopies<double, double> sweep_copies_f64{load_rows<double, double>, unload_rows<double, double>};
const SweepCopies<float, double> sweep_copies_f32_in_f64{load_rows<float, double>, unload_rows<float, double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
