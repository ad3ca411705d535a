// Vectors of the instruction set this translation unit is compiled for, through the compilers' vector extension: the
// same source is SSE2, AVX2, AVX-512 or NEON. Only for kernels.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace kronfac::kernels::KRONFAC_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

// Elements of T in one vector.
template <class T>
inline constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <class T>
static inline Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
static inline void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first n lanes only, 0 < n <= lanes; the other lanes of what is loaded are zero.
template <class T>
static inline Vector<T> load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return (Vector<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
  } else {
    return (Vector<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), p);
  }
#else
  T lane[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return load(lane);
#endif
}

template <class T>
static inline void store_first(T* p, Vector<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1u), (__m512d)v);
  }
#else
  T lane[kLanes<T>];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
#endif
}

// Stores of whole cache lines that bypass the caches, where vectors are as wide as that. Other threads see them after
// stores_done().
#if defined(__AVX512F__)
inline constexpr bool kStoresPastCaches = true;
template <class T>
static inline void store_past_caches(T* p, Vector<T> v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
}
static inline void stores_done() { _mm_sfence(); }
#else
inline constexpr bool kStoresPastCaches = false;
template <class T>
static inline void store_past_caches(T* p, Vector<T> v) {
  store(p, v);
}
static inline void stores_done() {}
#endif

// low := x0 y0 x1 y1 ..., high := the rest of the same sequence.
template <class V>
static inline __attribute__((always_inline)) void interleave(const V& x, const V& y, V& low, V& high) {
  constexpr int lanes = static_cast<int>(sizeof(V) / sizeof(x[0]));
  if constexpr (lanes == 2) {
    low = __builtin_shufflevector(x, y, 0, 2);
    high = __builtin_shufflevector(x, y, 1, 3);
  } else if constexpr (lanes == 4) {
    low = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
  } else if constexpr (lanes == 8) {
    low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(lanes == 16);
    low = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Vectors of S and the same numbers in memory as T: the same type, or float and double. Lane by lane, compilers take
// them apart.
template <class S, class T>
static inline __attribute__((always_inline)) Vector<S> load_as(const T* p) {
  if constexpr (sizeof(T) == sizeof(S)) {
    return load(p);
  } else {
    typedef S Half __attribute__((vector_size(kVectorBytes / 2)));
    const Half x = __builtin_convertvector(load(p), Half), y = __builtin_convertvector(load(p + kLanes<T>), Half);
    if constexpr (kLanes<S> == 4) {
      return __builtin_shufflevector(x, y, 0, 1, 2, 3);
    } else if constexpr (kLanes<S> == 8) {
      return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7);
    } else {
      return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }
}

template <class S, class T>
static inline __attribute__((always_inline)) void store_as(T* p, Vector<S> v) {
  if constexpr (sizeof(T) == sizeof(S)) {
    store(p, v);
  } else {
    const auto put = [](T* to, auto half) { store(to, __builtin_convertvector(half, Vector<T>)); };
    if constexpr (kLanes<S> == 4) {
      put(p, __builtin_shufflevector(v, v, 0, 1));
      put(p + 2, __builtin_shufflevector(v, v, 2, 3));
    } else if constexpr (kLanes<S> == 8) {
      put(p, __builtin_shufflevector(v, v, 0, 1, 2, 3));
      put(p + 4, __builtin_shufflevector(v, v, 4, 5, 6, 7));
    } else {
      put(p, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
      put(p + 8, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
    }
  }
}

// Sum of the lanes in double, in ascending order of the lanes.
template <class T>
static inline double lane_sum(Vector<T> v) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

}  // namespace kronfac::kernels::KRONFAC_ISA
