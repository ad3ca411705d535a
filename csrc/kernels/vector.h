// Vectors of the instruction set this translation unit is compiled for, through the compilers' vector extension: the
// same source is SSE2, AVX2, AVX-512 or NEON. Only for kernels.
#pragma once

#include <cstdint>

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

// Sum of the lanes in double, in ascending order of the lanes.
template <class T>
static inline double lane_sum(Vector<T> v) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

}  // namespace kronfac::kernels::KRONFAC_ISA
