#include "kernels/damped_inverse.h"

#include "kernels/gemm_pack.h"
#include "kernels/pivot_block.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Tiles of the transposing copies: 16 x 16 floats are 16 cache lines on either side.
constexpr int64_t kTile = 16;
template <class T>
bool copy_in(const T* f, int64_t row_stride, int64_t col_stride, int64_t n, int64_t row0, int64_t row1, T* x) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> defect{};
  int bad = 0;
  for (int64_t ib = row0; ib < row1; ib += kTile) {
    const int64_t ie = smaller(ib + kTile, row1);
    if (col_stride == 1) {
      for (int64_t i = ib; i < ie; ++i) {
        const T* source = f + i * row_stride;
        T* target = x + i * n;
        int64_t j = 0;
        for (; j + lanes <= i + 1; j += lanes) {
          const Vector<T> v = load(source + j);
          store(target + j, v);
          defect += v - v;
        }
        if (j <= i) {
          const Vector<T> v = load_first(source + j, i + 1 - j);
          store_first(target + j, v, i + 1 - j);
          defect += v - v;
        }
      }
    } else {
      // Tiles, because f may be column-major.
      for (int64_t jb = 0; jb < ie; jb += kTile) {
        for (int64_t i = ib; i < ie; ++i) {
          const T* source = f + i * row_stride;
          T* target = x + i * n;
          for (int64_t j = jb; j < smaller(jb + kTile, i + 1); ++j) {
            const T value = source[j * col_stride];
            target[j] = value;
            bad |= not_finite(value);
          }
        }
      }
    }
    for (int64_t i = ib; i < ie; ++i) {
      for (int64_t j = i + 1; j < n; ++j) x[i * n + j] = 0;
    }
  }
  return bad == 0 && all_zero<T>(defect);
}

template <class T>
int32_t small(const T* f, int64_t row_stride, int64_t col_stride, int64_t n, Real damping, T* x) {
  alignas(64) Real u[kLeaf * kLeaf];
  alignas(64) Real w[kLeaf * kLeaf];
  const int64_t padded = pad<kLeaf>(u, n);
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const T value = f[i * row_stride + j * col_stride];
      bad |= not_finite(value);
      u[j * kLeaf + i] = static_cast<Real>(value);
    }
    u[i * kLeaf + i] += damping;
  }
  if (bad != 0) return -1;
  if (const int32_t info = invert_root<kLeaf>(u, w, padded)) return info;
  // x := W^T W, upper triangle first: row i is the sum over k >= i of W[k, i] times row k of W; W is lower, so all of
  // row k counts for the symmetric result, and the part right of the diagonal is what is kept.
  clear<kLeaf>(u, padded);
  constexpr int64_t lanes = kLanes<Real>;
  for (int64_t i = 0; i < padded; i += kRows) {
    for (int64_t j = i / lanes * lanes; j < padded; j += lanes) {
      Vector<Real> sum[kRows] = {};
      for (int64_t k = j; k < padded; ++k) {
        const Vector<Real> row = load(w + k * kLeaf + j);
        for (int r = 0; r < kRows; ++r) sum[r] += w[k * kLeaf + i + r] * row;
      }
      for (int r = 0; r < kRows; ++r) store(u + (i + r) * kLeaf + j, sum[r]);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) x[i * n + j] = static_cast<T>(u[j * kLeaf + i]);
    for (int64_t j = i; j < n; ++j) {
      const T value = static_cast<T>(u[i * kLeaf + j]);
      x[i * n + j] = value;
      bad |= not_finite(value);
    }
  }
  return bad == 0 ? 0 : -1;
}

template <class T>
bool mirror(T* x, int64_t n, int64_t row0, int64_t row1) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> defect{};
  int bad = 0;
  for (int64_t ib = row0; ib < row1; ib += lanes) {
    const int64_t ie = smaller(ib + lanes, row1);
    for (int64_t jb = 0; jb < ie; jb += lanes) {
      if (ie - ib == lanes && jb + lanes <= ib) {
        Vector<T> v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          v[i] = load(x + (ib + i) * n + jb);
          defect += v[i] - v[i];
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(x + (jb + i) * n + ib, v[i]);
        continue;
      }
      for (int64_t i = ib; i < ie; ++i) {
        for (int64_t j = jb; j < smaller(jb + lanes, i); ++j) {
          const T value = x[i * n + j];
          x[j * n + i] = value;
          bad |= not_finite(value);
        }
      }
    }
    for (int64_t i = ib; i < ie; ++i) bad |= not_finite(x[i * n + i]);
  }
  return bad == 0 && all_zero<T>(defect);
}

}  // namespace

const DampedInverseKernels<float> damped_inverse_f32{.copy_in = copy_in<float>,
                                                     .small = small<float>,
                                                     .mirror = mirror<float>,
                                                     .sweep = &sweep_f32,
                                                     .large_sweep = &large_sweep_f32,
                                                     .sweep_copies = &sweep_copies_f32,
                                                     .wide_sweep_copies = &sweep_copies_f32_in_f64};
const DampedInverseKernels<double> damped_inverse_f64{.copy_in = copy_in<double>,
                                                      .small = small<double>,
                                                      .mirror = mirror<double>,
                                                      .sweep = &sweep_f64,
                                                      .large_sweep = &large_sweep_f64,
                                                      .sweep_copies = &sweep_copies_f64,
                                                      .wide_sweep_copies = &sweep_copies_f64};

}  // namespace kronfac::kernels::KRONFAC_ISA
