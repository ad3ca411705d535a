// Packed, register-blocked matrix product (the loop order of Goto and van de Geijn, ACM TOMS 34(3), 2008).
#include "kernels/gemm.h"

#include "kernels/elements.h"

#define KRONFAC_JOIN_(a, b) a##b
#define KRONFAC_JOIN(a, b) KRONFAC_JOIN_(a, b)

namespace kronfac::kernels::KRONFAC_ISA {

template <>
constexpr Blocks blocks_of<float>() {
  return blocks::KRONFAC_JOIN(KRONFAC_ISA, _f32);
}
template <>
constexpr Blocks blocks_of<double>() {
  return blocks::KRONFAC_JOIN(KRONFAC_ISA, _f64);
}

namespace {

constexpr int64_t alignment = 64;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- packing -------------------------------------------------------------------------------------------------------------

// One panel [nk][Width] of columns whose entry (k, j) lies at source + k * k_stride + j * j_stride; nj <= Width are real.
template <int Width, class T, class S>
void pack_panel(const S* source, int64_t k_stride, int64_t j_stride, int64_t nk, int64_t nj, T* panel) {
  if (nj < Width) {
    for (int64_t k = 0; k < nk; ++k) {
      const S* row = source + k * k_stride;
      T* out = panel + k * Width;
      for (int64_t j = 0; j < nj; ++j) out[j] = convert<T>(row[j * j_stride]);
      for (int64_t j = nj; j < Width; ++j) out[j] = T(0);
    }
  } else if (j_stride == 1) {
    for (int64_t k = 0; k < nk; ++k) {
      const S* row = source + k * k_stride;
      T* out = panel + k * Width;
      for (int j = 0; j < Width; ++j) out[j] = convert<T>(row[j]);
    }
  } else if (k_stride == 1) {
    // Runs of 16 along k: long enough to read whole cache lines, short enough that the written lines stay in L1.
    for (int64_t k0 = 0; k0 < nk; k0 += 16) {
      const int64_t kn = smaller(16, nk - k0);
      for (int j = 0; j < Width; ++j) {
        const S* column = source + j * j_stride + k0;
        T* out = panel + k0 * Width + j;
        for (int64_t k = 0; k < kn; ++k) out[k * Width] = convert<T>(column[k]);
      }
    }
  } else {
    for (int64_t k = 0; k < nk; ++k) {
      const S* row = source + k * k_stride;
      T* out = panel + k * Width;
      for (int j = 0; j < Width; ++j) out[j] = convert<T>(row[j * j_stride]);
    }
  }
}

template <int Width, class T>
void pack_matrix_panels(const Matrix& matrix, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels) {
  visit(matrix.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    const S* source = static_cast<const S*>(matrix.data) + k0 * matrix.row_stride + j0 * matrix.col_stride;
    for (int64_t j = 0; j < nj; j += Width) {
      pack_panel<Width>(source + j * matrix.col_stride, matrix.row_stride, matrix.col_stride, nk, smaller(Width, nj - j),
                        panels + j * nk);
    }
  });
}

template <class T>
void pack_matrix(const void* context, int64_t k0, int64_t nk, int64_t j0, int64_t nj, int64_t width, T* panels) {
  constexpr Blocks block = blocks_of<T>();
  const Matrix& matrix = *static_cast<const Matrix*>(context);
  if (width == block.mr) {
    pack_matrix_panels<block.mr>(matrix, k0, nk, j0, nj, panels);
  } else {
    pack_matrix_panels<block.nr>(matrix, k0, nk, j0, nj, panels);
  }
}

// --- register tile -------------------------------------------------------------------------------------------------------

// C (MR, NR) := beta * C + alpha * A B for packed strips a [kc][MR], b [kc][NR]; beta == 0 does not read C.
template <class T>
struct Tile {
  static constexpr Blocks block = blocks_of<T>();
  static constexpr int rows = block.mr, vectors = block.nr * static_cast<int>(sizeof(T)) / block.vector_bytes;
  static constexpr int lanes = block.vector_bytes / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(block.vector_bytes)));

  static inline Vector load(const T* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(T* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }

  static inline void run(int64_t kc, const T* __restrict a, const T* __restrict b, T alpha, T beta, T* __restrict c,
                         int64_t ldc) {
    Vector sum[rows][vectors] = {};
    for (int64_t k = 0; k < kc; ++k) {
      Vector right[vectors];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) right[j] = load(b + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vector left = a[i] - Vector{};
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
      }
      a += block.mr;
      b += block.nr;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        T* p = c + i * ldc + j * lanes;
        store(p, beta == T(0) ? alpha * sum[i][j] : beta * load(p) + alpha * sum[i][j]);
      }
    }
  }
};

// One tile at (i, j) of C where only part of it is to be written: past the edge, or on the diagonal of a triangle.
template <class T>
void partial_tile(int64_t kc, const T* a, const T* b, T alpha, T beta, T* c, int64_t ldc, int64_t rows, int64_t columns,
                  const Triangle& triangle, int64_t i, int64_t j) {
  constexpr Blocks block = blocks_of<T>();
  alignas(alignment) T whole[block.mr * block.nr];
  Tile<T>::run(kc, a, b, alpha, T(0), whole, block.nr);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t last = triangle.lower ? triangle.row0 + i + r - triangle.col0 - j + 1 : columns;
    T* out = c + r * ldc;
    const T* in = whole + r * block.nr;
    for (int64_t s = 0; s < smaller(columns, last); ++s) out[s] = beta == T(0) ? in[s] : beta * out[s] + in[s];
  }
}

// C block (m, n) from packed A [m/MR][kc][MR] and packed B [n/NR][kc][NR]; (i0, j0) is its place in C.
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
      const T *strip = a + i * kc, *panel = b + j * kc;
      T* tile = c + (i0 + i) * ldc + j0 + j;
      if (rows == block.mr && columns == block.nr && !crosses) {
        Tile<T>::run(kc, strip, panel, alpha, beta, tile, ldc);
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
constexpr int64_t packed_bytes(int64_t extent, int64_t block, int64_t width, int64_t k) {
  const int64_t kc = smaller(k, blocks_of<T>().kc);
  return round_up(round_up(smaller(extent, block), width) * kc * static_cast<int64_t>(sizeof(T)), alignment);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, T* c, int64_t ldc,
          const Triangle& triangle, void* scratch) {
  const Matrix left = a.transposed();
  multiply<T>(m, n, k, static_cast<T>(alpha), matrix_source<T>(&left), matrix_source<T>(&b), static_cast<T>(beta), c, ldc,
              triangle, scratch);
}

}  // namespace

template <class T>
Source<T> matrix_source(const Matrix* matrix) {
  return {pack_matrix<T>, matrix};
}

template <class T>
int64_t multiply_scratch(int64_t m, int64_t n, int64_t k) {
  constexpr Blocks block = blocks_of<T>();
  return packed_bytes<T>(m, block.mc, block.mr, k) + packed_bytes<T>(n, block.nc, block.nr, k);
}

template <class T>
void multiply(int64_t m, int64_t n, int64_t k, T alpha, const Source<T>& a, const Source<T>& b, T beta, T* c, int64_t ldc,
              const Triangle& triangle, void* scratch) {
  constexpr Blocks block = blocks_of<T>();
  static_assert(block.nr % block.mr == 0 && block.mc % block.mr == 0 && block.nc % block.nr == 0);
  if (m <= 0 || n <= 0) return;
  if (k <= 0) return scale_only(m, n, beta, c, ldc, triangle);
  T* packed_a = static_cast<T*>(scratch);
  T* packed_b = reinterpret_cast<T*>(static_cast<char*>(scratch) + packed_bytes<T>(m, block.mc, block.mr, k));
  for (int64_t j = 0; j < n; j += block.nc) {
    const int64_t nc = smaller(block.nc, n - j);
    for (int64_t p = 0; p < k; p += block.kc) {
      const int64_t kc = smaller(block.kc, k - p);
      const T keep = p == 0 ? beta : T(1);
      bool packed = false;
      for (int64_t i = 0; i < m; i += block.mc) {
        const int64_t mc = smaller(block.mc, m - i);
        if (triangle.lower && triangle.row0 + i + mc - 1 < triangle.col0 + j) continue;  // wholly above the diagonal
        if (!packed) b.pack(b.context, p, kc, b.j_origin + j, nc, block.nr, packed_b);
        packed = true;
        a.pack(a.context, p, kc, a.j_origin + i, mc, block.mr, packed_a);
        multiply_packed(mc, nc, kc, alpha, packed_a, packed_b, keep, c, ldc, triangle, i, j);
      }
    }
  }
}

void gemm_f32(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, float* c,
              int64_t ldc, const Triangle& triangle, void* scratch) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, triangle, scratch);
}
void gemm_f64(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta, double* c,
              int64_t ldc, const Triangle& triangle, void* scratch) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, triangle, scratch);
}

template Source<float> matrix_source<float>(const Matrix*);
template Source<double> matrix_source<double>(const Matrix*);
template int64_t multiply_scratch<float>(int64_t, int64_t, int64_t);
template int64_t multiply_scratch<double>(int64_t, int64_t, int64_t);
template void multiply<float>(int64_t, int64_t, int64_t, float, const Source<float>&, const Source<float>&, float, float*,
                              int64_t, const Triangle&, void*);
template void multiply<double>(int64_t, int64_t, int64_t, double, const Source<double>&, const Source<double>&, double,
                               double*, int64_t, const Triangle&, void*);

}  // namespace kronfac::kernels::KRONFAC_ISA
