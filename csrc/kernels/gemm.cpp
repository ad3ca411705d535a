// Packed, register-blocked matrix product (the loop order of Goto and van de Geijn, ACM TOMS 34(3), 2008).
#include "kernels/gemm.h"

#include "kernels/gemm_pack.h"
#include "kernels/gemm_split.h"
#include "kernels/gemm_tile.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Rows of A and C that one panel of B is multiplied with: where rows are pages apart, those of A and C together must
// not exceed what the TLB holds (at 2000 x 2000 x 2000: 162 GF/s with 960 rows, 171 to 190 with 384).
constexpr int64_t kRowBlock = 384;
// Up to so many tiles of rows a panel of B is read in place: packing it would cost more than it saves.
constexpr int64_t kUnpackedTiles = 40;
// The longest sum that is not interrupted. With 512 bit vectors a panel of B this deep lies in L2 rather than L1, which
// the tile's few loads for each multiply-add allow, and C is read and written half as often.
template <class T>
constexpr int64_t kDepth = blocks_of<T>().kc * (kVectorBytes == 64 ? 2 : 1);

template <class T>
constexpr int64_t kMr = blocks_of<T>().mr;
template <class T>
constexpr int64_t kNr = blocks_of<T>().nr;

// A panel of one operand and the distance between its lines: rows of A where it is read in place, k of B.
template <class T>
struct Panel {
  const T* data;
  int64_t stride;
};

// The parts of one call that do not change from tile to tile.
template <class T>
struct Product {
  T alpha;
  T* c;
  int64_t ldc;
  Triangle triangle;
  bool in_place;  // A
};

// A tile on the diagonal of a triangle: computed whole, and the part below the diagonal is added to C.
template <class T>
void diagonal_tile(const Product<T>& p, TileKernel<T> kernel, TileOperands<T> t, int64_t kc, int64_t rows,
                   int64_t columns, int64_t below) {
  alignas(panel_alignment) T whole[kMr<T> * kNr<T>];
  T* c = t.c;
  const T beta = t.beta;
  t.c = whole;
  t.ldc = kNr<T>;
  t.tail = kLanes<T>;
  t.beta = T(0);
  kernel(kc, t);
  for (int64_t r = 0; r < rows; ++r) {
    T* out = c + r * p.ldc;
    const T* in = whole + r * kNr<T>;
    for (int64_t s = 0; s < smaller(columns, below + r + 1); ++s) out[s] = beta == T(0) ? in[s] : beta * out[s] + in[s];
  }
}

// C (rows i0 to i0 + m, columns j0 to j0 + columns <= NR) from all of A's rows in this block and one panel of B.
template <class T>
void multiply_panel(const Product<T>& p, int64_t i0, int64_t m, int64_t j0, int64_t columns, int64_t kc,
                    const Panel<T>& a, const Panel<T>& b, const Panel<T>& next, T beta) {
  constexpr int64_t lanes = kLanes<T>, line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < m; i += kMr<T>) {
    const int64_t rows = smaller(kMr<T>, m - i);
    // Distance of the tile's first entry from the diagonal: below zero, it lies above.
    const int64_t below = p.triangle.row0 + i0 + i - p.triangle.col0 - j0;
    int64_t needed = columns;
    if (p.triangle.lower) {
      if (below + rows - 1 < 0) continue;
      needed = smaller(columns, below + rows);
    }
    const int64_t vectors = (needed + lanes - 1) / lanes;
    const TileKernel<T> kernel =
        p.in_place ? kTileKernels<T, true>(rows, vectors) : kTileKernels<T, false>(rows, vectors);
    const TileOperands<T> t{p.in_place ? a.data + i * a.stride : a.data + i * kc,
                            a.stride,
                            b.data,
                            b.stride,
                            next.data + smaller(i / kMr<T>, kNr<T> / line) * line,
                            next.stride,
                            p.alpha,
                            beta,
                            p.c + (i0 + i) * p.ldc + j0,
                            p.ldc,
                            needed - (vectors - 1) * lanes};
    if (p.triangle.lower && below < columns - 1) {
      diagonal_tile(p, kernel, t, kc, rows, columns, below);
    } else {
      kernel(kc, t);
    }
  }
}

// C := beta * C on the written part, for an empty sum.
template <class T>
void scale_only(int64_t m, int64_t n, T beta, T* c, int64_t ldc, const Triangle& triangle) {
  for (int64_t i = 0; i < m; ++i) {
    const int64_t last = triangle.lower ? smaller(n, triangle.row0 + i - triangle.col0 + 1) : n;
    for (int64_t j = 0; j < last; ++j) c[i * ldc + j] = beta == T(0) ? T(0) : beta * c[i * ldc + j];
  }
}

template <class T>
constexpr int64_t left_bytes(int64_t m, int64_t k) {
  const int64_t rows = round_up(smaller(m, kRowBlock), kMr<T>), kc = smaller(k, kDepth<T>);
  return round_up(rows * kc * static_cast<int64_t>(sizeof(T)), panel_alignment);
}

template <class T>
int64_t gemm_scratch(int64_t m, int64_t, int64_t k) {
  constexpr int64_t panel = kNr<T> * kDepth<T> * static_cast<int64_t>(sizeof(T));
  return left_bytes<T>(m, k) + round_up(panel, panel_alignment);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, const Matrix& a, const Matrix& b, T beta, T* c, int64_t ldc,
          const Triangle& triangle, [[maybe_unused]] bool split, void* scratch) {
  constexpr Blocks block = blocks_of<T>();
  static_assert(block.nr % block.mr == 0 && kRowBlock % block.mr == 0);
  if (m <= 0 || n <= 0) return;
  if (k <= 0) return scale_only(m, n, beta, c, ldc, triangle);
#ifdef KRONFAC_SPLIT
  if constexpr (sizeof(T) == sizeof(float)) {
    if (split) return gemm_split(m, n, k, alpha, a, b, beta, c, ldc, triangle, scratch);
  }
#endif
  constexpr Element own = sizeof(T) == sizeof(float) ? Element::f32 : Element::f64;
  const Matrix left = a.transposed();
  const bool right_in_place = b.type == own && b.col_stride == 1 && m <= kUnpackedTiles * block.mr;
  const Product<T> product{alpha, c, ldc, triangle, a.type == own && a.col_stride == 1};
  T* packed_a = static_cast<T*>(scratch);
  T* packed_b = reinterpret_cast<T*>(static_cast<char*>(scratch) + left_bytes<T>(m, k));
  const int64_t blocks = (k + kDepth<T> - 1) / kDepth<T>, depth = (k + blocks - 1) / blocks;
  for (int64_t i = 0; i < m; i += kRowBlock) {
    const int64_t mc = smaller(kRowBlock, m - i);
    for (int64_t p = 0; p < k; p += depth) {
      const int64_t kc = smaller(depth, k - p);
      Panel<T> rows{packed_a, 0};
      if (product.in_place) {
        rows = {static_cast<const T*>(a.data) + i * a.row_stride + p, a.row_stride};
      } else {
        pack_panels<T, block.mr>(left, p, kc, i, mc, packed_a);
      }
      for (int64_t j = 0; j < n; j += block.nr) {
        const int64_t nc = smaller(block.nr, n - j);
        if (triangle.lower && triangle.row0 + i + mc - 1 < triangle.col0 + j) break;  // wholly above the diagonal
        Panel<T> columns{packed_b, block.nr};
        if (right_in_place && nc % kLanes<T> == 0) {
          columns = {static_cast<const T*>(b.data) + p * b.row_stride + j, b.row_stride};
        } else {
          // Just before it is used, so that it is still in L1.
          pack_panels<T, block.nr>(b, p, kc, j, nc, packed_b);
        }
        // The tiles of this panel fetch the next one, whose rows are too far apart for the hardware to foresee.
        Panel<T> next = columns;
        if (b.type == own && b.col_stride == 1) {
          const bool last = j + block.nr >= n;
          next = {static_cast<const T*>(b.data) + (last ? p + kc : p) * b.row_stride + (last ? 0 : j + block.nr),
                  b.row_stride};
        }
        multiply_panel(product, i, mc, j, nc, kc, rows, columns, next, p == 0 ? beta : T(1));
      }
    }
  }
}

}  // namespace

void gemm_f32(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, float* c,
              int64_t ldc, const Triangle& triangle, bool split, void* scratch) {
  gemm(m, n, k, static_cast<float>(alpha), a, b, static_cast<float>(beta), c, ldc, triangle, split, scratch);
}
void gemm_f64(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, double* c,
              int64_t ldc, const Triangle& triangle, bool split, void* scratch) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, triangle, split, scratch);
}
int64_t gemm_scratch_f32(int64_t m, int64_t n, int64_t k) {
#ifdef KRONFAC_SPLIT
  return larger(gemm_scratch<float>(m, n, k), GemmSplitLayout::most_bytes(m, n, k));
#else
  return gemm_scratch<float>(m, n, k);
#endif
}
int64_t gemm_scratch_f64(int64_t m, int64_t n, int64_t k) { return gemm_scratch<double>(m, n, k); }
bool gemm_split_pays([[maybe_unused]] int64_t m, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t k) {
#ifdef KRONFAC_SPLIT
  return gemm_split_worthwhile(m, n, k);
#else
  return false;
#endif
}

}  // namespace kronfac::kernels::KRONFAC_ISA
