#include "kernels/batch_eigh.h"

#include "kernels/gemm_pack.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

template <class T>
static constexpr T kEpsilon = sizeof(T) == sizeof(float) ? T(0x1p-23) : T(0x1p-52);

// With 8 lanes 0.5, 2, 11, 74 and 450 us for each matrix of order 8, 16, 32, 64 and 128, where LAPACK takes 4, 12, 41,
// 135 and 490; the time is that of a vector, so that half the lanes take twice as long.
constexpr int64_t kLargestOrder = kVectorBytes == 64 ? 128 : kVectorBytes;

// QL steps until a matrix counts as not converging, for each of its eigenvalues (LAPACK's limit; two are usual).
constexpr int64_t kStepsPerValue = 30;
template <class T>
static inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

template <class T>
static inline Vector<T> magnitude(Vector<T> x) {
  return x < T(0) ? -x : x;
}

template <class T>
static inline Vector<T> square_root(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return (Vector<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  } else {
    return (Vector<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
  }
#else
  Vector<T> y;
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    if constexpr (sizeof(T) == sizeof(float)) {
      y[l] = __builtin_sqrtf(x[l]);
    } else {
      y[l] = __builtin_sqrt(x[l]);
    }
  }
  return y;
#endif
}

// True when a lane of the mask (0 or -1 each) is set.
template <class Mask>
static inline bool any(const Mask& mask) {
  bool set = false;
  for (int64_t l = 0; l < static_cast<int64_t>(sizeof(mask) / sizeof(mask[0])); ++l) set |= mask[l] != 0;
  return set;
}

// The matrices of all lanes. Every member points to vectors: entry (i, j) of a square one is at i * n + j.
template <class T>
struct Batch {
  using V = Vector<T>;
  int64_t n;
  V *a, *q;  // the matrices, whose rows become the reflections; the basis
  V *d, *e;  // diagonal and subdiagonal: e[i] couples i and i + 1
  V *h, *p;  // half squared lengths of the reflections; a vector of work
  V *c, *s;  // cosines and sines of two sequences of rotations

  Batch(int64_t order, void* scratch) : n(order), a(static_cast<V*>(scratch)), q(a + n * n), d(q + n * n) {
    e = d + n;
    h = e + n;
    p = h + n;
    c = p + n;
    s = c + 2 * n;
  }
  static int64_t bytes(int64_t n) { return (2 * n * n + 8 * n) * static_cast<int64_t>(sizeof(V)); }
};

// Tridiagonal form of a. Row i of a is left with the reflection that cleared it: I - v v^T / h[i], v in columns below
// i; h[i] = 0 where there was nothing to clear.
template <class T>
void tridiagonalise(const Batch<T>& b) {
  using V = Vector<T>;
  const int64_t n = b.n;
  const V zero{};
  for (int64_t i = n - 1; i > 0; --i) {
    V* v = b.a + i * n;
    V tail = zero;
    for (int64_t k = 0; k < i - 1; ++k) tail += v[k] * v[k];
    const V last = v[i - 1];
    const V length = square_root<T>(tail + last * last);
    const V sub = last > T(0) ? -length : length;
    const auto none = tail == T(0);
    b.e[i - 1] = none ? last : sub;
    v[i - 1] = last - sub;
    const V h = none ? zero : length * (length + magnitude<T>(last));
    b.h[i] = h;
    if (i == 1) continue;
    const V inverse = none ? zero : T(1) / (none ? splat(T(1)) : h);
    // p := A v / h from the lower triangle.
    V* p = b.p;
    int64_t j = 0;
    for (; j + 2 <= i; j += 2) {
      const V *row = b.a + j * n, *below = row + n;
      const V v0 = v[j], v1 = v[j + 1];
      V sum0 = row[j] * v0 + below[j] * v1, sum1 = below[j] * v0 + below[j + 1] * v1;
      for (int64_t k = 0; k < j; ++k) {
        const V x = row[k], y = below[k], vk = v[k];
        sum0 += x * vk;
        sum1 += y * vk;
        p[k] += x * v0 + y * v1;
      }
      p[j] = sum0;
      p[j + 1] = sum1;
    }
    for (; j < i; ++j) {
      const V* row = b.a + j * n;
      const V vj = v[j];
      V sum = row[j] * vj;
      for (int64_t k = 0; k < j; ++k) {
        sum += row[k] * v[k];
        p[k] += row[k] * vj;
      }
      p[j] = sum;
    }
    V inner = zero;
    for (j = 0; j < i; ++j) {
      p[j] *= inverse;
      inner += p[j] * v[j];
    }
    const V half = T(0.5) * inner * inverse;
    for (j = 0; j < i; ++j) p[j] -= half * v[j];
    for (j = 0; j < i; ++j) {
      V* row = b.a + j * n;
      const V vj = v[j], pj = p[j];
      for (int64_t k = 0; k <= j; ++k) row[k] -= vj * p[k] + pj * v[k];
    }
  }
  for (int64_t i = 0; i < n; ++i) b.d[i] = b.a[i * n + i];
}

// Rows of q that are gone through together: one load of the vectors beside them serves all.
constexpr int64_t kRowGroup = 4;

// Some rows of q, columns below i, := themselves minus v_k g; to next, their sum weighted by w.
template <class T, int64_t rows>
static inline void reflect_rows(Vector<T>* q, int64_t n, int64_t i, const Vector<T>* v, const Vector<T>* g,
                                const Vector<T>* w, Vector<T>* next) {
  Vector<T> scale[rows], weight[rows];
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = v[r];
    weight[r] = w[r];
  }
  for (int64_t j = 0; j < i; ++j) {
    const Vector<T> gj = g[j];
    Vector<T> sum = next[j];
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<T> x = q[r * n + j] - scale[r] * gj;
      q[r * n + j] = x;
      sum += weight[r] * x;
    }
    next[j] = sum;
  }
}

// q := the product of the reflections, from the smallest on. The products of the next one with q are summed while this
// one changes it.
template <class T>
void form_basis(const Batch<T>& b) {
  using V = Vector<T>;
  const int64_t n = b.n;
  const V zero{}, one = splat(T(1));
  V *g = b.c, *next = b.s;
  b.q[0] = one;
  for (int64_t j = 0; j < n; ++j) next[j] = zero;
  if (n > 1) next[0] = b.a[n];
  for (int64_t i = 1; i < n; ++i) {
    const auto none = b.h[i] == T(0);
    const V inverse = none ? zero : one / (none ? one : b.h[i]);
    for (int64_t j = 0; j < i; ++j) {
      g[j] = next[j] * inverse;
      next[j] = zero;
    }
    const V *v = b.a + i * n, *w = i + 1 < n ? v + n : b.q + i * n;  // the last sums are not used
    for (int64_t j = 0; j < i; ++j) b.q[i * n + j] = zero;
    int64_t k = 0;
    for (; k + kRowGroup <= i; k += kRowGroup) reflect_rows<T, kRowGroup>(b.q + k * n, n, i, v + k, g, w + k, next);
    for (; k < i; ++k) reflect_rows<T, 1>(b.q + k * n, n, i, v + k, g, w + k, next);
    for (int64_t j = 0; j < i; ++j) b.q[j * n + i] = zero;
    b.q[i * n + i] = one;
    next[i] = w[i];
  }
}

// Two sequences of rotations, one after the other, of the columns (i, i + 1) of some rows of q, each from last - 1 down
// to first. The second follows the first by one column, so that an entry is read and written once for both.
template <class T, int64_t rows>
static inline void rotate_rows(const Batch<T>& b, Vector<T>* q, int64_t first, int64_t last) {
  using V = Vector<T>;
  const int64_t n = b.n;
  const V *c2 = b.c + n, *s2 = b.s + n;
  V one[rows], two[rows];
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    const V left = q[r * n + last - 1], right = q[r * n + last];
    two[r] = b.s[last - 1] * left + b.c[last - 1] * right;
    one[r] = b.c[last - 1] * left - b.s[last - 1] * right;
  }
  for (int64_t i = last - 2; i >= first; --i) {
    const V ca = b.c[i], sa = b.s[i], cb = c2[i + 1], sb = s2[i + 1];
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const V left = q[r * n + i], middle = sa * left + ca * one[r];
      one[r] = ca * left - sa * one[r];
      q[r * n + i + 2] = sb * middle + cb * two[r];
      two[r] = cb * middle - sb * two[r];
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    q[r * n + first + 1] = s2[first] * one[r] + c2[first] * two[r];
    q[r * n + first] = c2[first] * one[r] - s2[first] * two[r];
  }
}

template <class T>
void rotate(const Batch<T>& b, int64_t first, int64_t last) {
  int64_t r = 0;
  for (; r + kRowGroup <= b.n; r += kRowGroup) rotate_rows<T, kRowGroup>(b, b.q + r * b.n, first, last);
  for (; r < b.n; ++r) rotate_rows<T, 1>(b, b.q + r * b.n, first, last);
}

// Eigenvalues to d, eigenvectors to the columns of q. A subdiagonal entry counts as zero at `small` or, next to large
// diagonal entries, at the rounding of those. Returns the lanes that did not converge.
template <class T>
uint32_t iterate(const Batch<T>& b, T small) {
  using V = Vector<T>;
  const int64_t n = b.n;
  constexpr int64_t lanes = kLanes<T>;
  const V zero{}, one = splat(T(1));
  // Indices as numbers, so that they are selected like all else.
  V low = zero, high;
  b.e[n - 1] = zero;
  // Rotations wait for those of the next step; `half` are the ones of this step, identities past first and last.
  int64_t half = 0, rotated_first = n - 1, rotated_last = 0;
  const auto rotate_all = [&] {
    if (rotated_first < rotated_last) rotate(b, rotated_first, rotated_last);
    rotated_first = n - 1;
    rotated_last = 0;
    half = 0;
    for (int64_t i = 0; i < 2 * n; ++i) {
      b.c[i] = one;
      b.s[i] = zero;
    }
  };
  rotate_all();
  for (int64_t step = 0; step <= kStepsPerValue * n; ++step) {
    // Where each lane works: the first block [low, high] that is not split. Both run down once.
    high = splat(static_cast<T>(n - 1));
    int64_t lowest = n - 1;
    for (int64_t l = 0; l < lanes; ++l) lowest = smaller(lowest, static_cast<int64_t>(low[l]));
    for (int64_t i = lowest; i < n - 1; ++i) {
      const auto split =
          magnitude<T>(b.e[i]) <= kEpsilon<T> * (magnitude<T>(b.d[i]) + magnitude<T>(b.d[i + 1])) + small;
      b.e[i] = split ? zero : b.e[i];
      low = (low == static_cast<T>(i)) && split ? splat(static_cast<T>(i + 1)) : low;
    }
    for (int64_t i = n - 2; i >= lowest; --i) {
      high = (b.e[i] == T(0)) && (low <= static_cast<T>(i)) ? splat(static_cast<T>(i)) : high;
    }
    int64_t first = n - 1, last = 0;
    V g = zero, d_low = zero, e_low = one, d_next = zero, d_high = zero;
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t lo = static_cast<int64_t>(low[l]), hi = static_cast<int64_t>(high[l]);
      if (lo >= n - 1) continue;
      first = smaller(first, lo);
      last = larger(last, hi);
      d_low[l] = b.d[lo][l];
      e_low[l] = b.e[lo][l];
      d_next[l] = b.d[lo + 1][l];
      d_high[l] = b.d[hi][l];
    }
    if (first >= last || step == kStepsPerValue * n) break;
    g = (d_next - d_low) / (e_low + e_low);
    const V root = square_root<T>(g * g + one);
    g = d_high - d_low + e_low / (g + (g < T(0) ? -root : root));
    V s = one, c = one, p = zero;
    for (int64_t i = last - 1; i >= first; --i) {
      const T at = static_cast<T>(i);
      const auto active = (low <= at) && (high > at);
      const V ei = b.e[i], f = s * ei, cb = c * ei, square = f * f + g * g;
      const auto flat = square == T(0);
      const V inverse = one / square_root<T>(flat ? one : square);
      const V r = square * inverse;
      const V s1 = flat ? zero : f * inverse, c1 = flat ? one : g * inverse;
      b.e[i + 1] = active ? (high == at + 1 ? zero : r) : b.e[i + 1];
      const V g1 = b.d[i + 1] - p, t = (b.d[i] - g1) * s1 + T(2) * c1 * cb, p1 = s1 * t;
      b.d[i + 1] = active ? g1 + p1 : b.d[i + 1];
      g = active ? c1 * t - cb : g;
      s = active ? s1 : s;
      c = active ? c1 : c;
      p = active ? p1 : p;
      b.s[half * n + i] = active ? s1 : zero;
      b.c[half * n + i] = active ? c1 : one;
      const auto end = active && (low == at);
      b.d[i] = end ? b.d[i] - p1 : b.d[i];
      b.e[i] = end ? g : b.e[i];
    }
    rotated_first = smaller(rotated_first, first);
    rotated_last = larger(rotated_last, last);
    if (++half == 2) rotate_all();
  }
  rotate_all();
  uint32_t failed = 0;
  for (int64_t l = 0; l < lanes; ++l) failed |= static_cast<uint32_t>(low[l] < static_cast<T>(n - 1)) << l;
  return failed;
}

// Work in T for matrices of type S.
template <class S, class T>
uint32_t solve(const BatchProblem<S>* problems, int64_t count, int64_t n, void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  const Batch<T> b(n, scratch);
  // Powers of two that bring the largest entries to the order of 1, so that squares neither overflow nor vanish.
  T scale[lanes], rest[lanes];
  T* a = reinterpret_cast<T*>(b.a);
  for (int64_t l = 0; l < lanes; ++l) {
    if (l >= count) {
      for (int64_t i = 0; i < n * n; ++i) a[i * lanes + l] = 0;
      continue;
    }
    const BatchProblem<S>& p = problems[l];
    T largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const T x = static_cast<T>(p.f[i * p.row_stride + j * p.col_stride]);
        a[(i * n + j) * lanes + l] = x;
        largest = x > largest ? x : -x > largest ? -x : largest;
      }
    }
    int exponent = 0;
    if (largest > 0) __builtin_frexp(static_cast<double>(largest), &exponent);
    // In two steps, because the inverse of the smallest numbers is none.
    scale[l] = static_cast<T>(__builtin_ldexp(1.0, -(exponent / 2)));
    rest[l] = static_cast<T>(__builtin_ldexp(1.0, exponent / 2 - exponent));
    if (exponent != 0) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          T& x = a[(i * n + j) * lanes + l];
          x = x * scale[l] * rest[l];
        }
      }
    }
  }
  tridiagonalise(b);
  form_basis(b);
  // What the result is rounded to anyway, relative to the largest entry.
  const uint32_t failed = iterate<T>(b, static_cast<T>(kEpsilon<S>) / (sizeof(S) == sizeof(T) ? 16 : 256));
  int64_t* order = reinterpret_cast<int64_t*>(b.a);
  const T* d = reinterpret_cast<const T*>(b.d);
  const T* q = reinterpret_cast<const T*>(b.q);
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t i = 0; i < n; ++i) {
      const T value = d[i * lanes + l];
      int64_t at = i;
      for (; at > 0 && d[order[at - 1] * lanes + l] > value; --at) order[at] = order[at - 1];
      order[at] = i;
    }
    const BatchProblem<S>& p = problems[l];
    for (int64_t k = 0; k < n; ++k) p.values[k] = static_cast<S>(d[order[k] * lanes + l] / rest[l] / scale[l]);
    for (int64_t k = 0; k < n; ++k) {
      const T* column = q + order[k] * lanes + l;
      for (int64_t r = 0; r < n; ++r) p.vectors[k * n + r] = static_cast<S>(column[r * n * lanes]);
    }
  }
  return failed & ((1u << count) - 1u);
}

template <class S, class T>
constexpr BatchEighKernels<S> kernels_of{
    .lanes = kLanes<T>, .largest_order = kLargestOrder, .scratch_bytes = Batch<T>::bytes, .solve = solve<S, T>};

}  // namespace

const BatchEighKernels<float> batch_eigh_f32 = kernels_of<float, double>;
const BatchEighKernels<double> batch_eigh_f64 = kernels_of<double, double>;

}  // namespace kronfac::kernels::KRONFAC_ISA
