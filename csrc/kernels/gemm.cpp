// Packed, register-blocked matrix product (the loop order of Goto and van de Geijn, ACM TOMS 34(3), 2008).
#include "kernels/gemm.h"

#include "kernels/tile.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

template <class T>
void pack_matrix(const Matrix& matrix, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels) {
  pack_matrix_panels<T>(matrix, k0, nk, j0, nj, panels, [](T x) { return x; });
}

// One tile at (i, j) of C where only part of it is to be written: past the edge, or on the diagonal of a triangle.
template <class T>
void partial_tile(int64_t kc, const T* a, const T* b, T alpha, T beta, T* c, int64_t ldc, int64_t rows, int64_t columns,
                  const Triangle& triangle, int64_t i, int64_t j) {
  constexpr Blocks block = blocks_of<T>();
  alignas(panel_alignment) T whole[block.mr * block.nr];
  Tile<T>::run(kc, a, b, [&](int r, int64_t s, Vector<T> v) { store(whole + r * block.nr + s, alpha * v); });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t last = triangle.lower ? triangle.row0 + i + r - triangle.col0 - j + 1 : columns;
    T* out = c + r * ldc;
    const T* in = whole + r * block.nr;
    for (int64_t s = 0; s < smaller(columns, last); ++s) out[s] = beta == T(0) ? in[s] : beta * out[s] + in[s];
  }
}

// C block (m, n) from packed A [m/NR][kc][NR] and packed B [n/NR][kc][NR]; (i0, j0) is its place in C.
template <class T>
void multiply_packed(int64_t m, int64_t n, int64_t kc, T alpha, const T* a, const T* b, T beta, T* c, int64_t ldc,
                     const Triangle& triangle, int64_t i0, int64_t j0) {
  constexpr Blocks block = blocks_of<T>();
  for (int64_t j = 0; j < n; j += block.nr) {
    const int64_t columns = smaller(block.nr, n - j);
    for (int64_t i = 0; i < m; i += block.mr) {
      const int64_t rows = smaller(block.mr, m - i);
      // Distance of the tile's corners from the diagonal: below zero, the entry lies above it.
      const int64_t below = triangle.row0 + i0 + i - triangle.col0 - j0 - j;
      if (triangle.lower && below + rows - 1 < 0) continue;
      const bool crosses = triangle.lower && below < columns - 1;
      const T *strip = packed_column(a, kc, i), *panel = b + j * kc;
      T* tile = c + (i0 + i) * ldc + j0 + j;
      if (rows == block.mr && columns == block.nr && !crosses) {
        if (beta == T(0)) {
          Tile<T>::run(kc, strip, panel, [&](int r, int64_t s, Vector<T> v) { store(tile + r * ldc + s, alpha * v); });
        } else {
          Tile<T>::run(kc, strip, panel, [&](int r, int64_t s, Vector<T> v) {
            T* out = tile + r * ldc + s;
            store(out, beta * load(out) + alpha * v);
          });
        }
      } else {
        partial_tile(kc, strip, panel, alpha, beta, tile, ldc, rows, columns, triangle, i0 + i, j0 + j);
      }
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
constexpr int64_t packed_bytes(int64_t extent, int64_t block, int64_t k) {
  const int64_t columns = round_up(smaller(extent, block), blocks_of<T>().nr), kc = smaller(k, blocks_of<T>().kc);
  return round_up(columns * kc * static_cast<int64_t>(sizeof(T)), panel_alignment);
}

template <class T>
int64_t gemm_scratch(int64_t m, int64_t n, int64_t k) {
  constexpr Blocks block = blocks_of<T>();
  return packed_bytes<T>(m, block.mc, k) + packed_bytes<T>(n, block.nc, k);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, const Matrix& a, const Matrix& b, T beta, T* c, int64_t ldc,
          const Triangle& triangle, void* scratch) {
  constexpr Blocks block = blocks_of<T>();
  static_assert(block.nr % block.mr == 0 && block.mc % block.nr == 0 && block.nc % block.nr == 0);
  if (m <= 0 || n <= 0) return;
  if (k <= 0) return scale_only(m, n, beta, c, ldc, triangle);
  const Matrix left = a.transposed();
  T* packed_a = static_cast<T*>(scratch);
  T* packed_b = reinterpret_cast<T*>(static_cast<char*>(scratch) + packed_bytes<T>(m, block.mc, k));
  for (int64_t j = 0; j < n; j += block.nc) {
    const int64_t nc = smaller(block.nc, n - j);
    for (int64_t p = 0; p < k; p += block.kc) {
      const int64_t kc = smaller(block.kc, k - p);
      const T keep = p == 0 ? beta : T(1);
      bool packed = false;
      for (int64_t i = 0; i < m; i += block.mc) {
        const int64_t mc = smaller(block.mc, m - i);
        if (triangle.lower && triangle.row0 + i + mc - 1 < triangle.col0 + j) continue;  // wholly above the diagonal
        if (!packed) pack_matrix(b, p, kc, j, nc, packed_b);
        packed = true;
        pack_matrix(left, p, kc, i, mc, packed_a);
        multiply_packed(mc, nc, kc, alpha, packed_a, packed_b, keep, c, ldc, triangle, i, j);
      }
    }
  }
}

}  // namespace

void gemm_f32(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, float* c,
              int64_t ldc, const Triangle& triangle, void* scratch) {
  gemm(m, n, k, static_cast<float>(alpha), a, b, static_cast<float>(beta), c, ldc, triangle, scratch);
}
void gemm_f64(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, double* c,
              int64_t ldc, const Triangle& triangle, void* scratch) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, triangle, scratch);
}
int64_t gemm_scratch_f32(int64_t m, int64_t n, int64_t k) { return gemm_scratch<float>(m, n, k); }
int64_t gemm_scratch_f64(int64_t m, int64_t n, int64_t k) { return gemm_scratch<double>(m, n, k); }

}  // namespace kronfac::kernels::KRONFAC_ISA
