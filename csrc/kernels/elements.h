// Element types as the kernels read them, and their conversion to the type of the sums. For kernels only.
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace kronfac::kernels::KRONFAC_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

template <class T>
static inline T convert(float x) {
  return static_cast<T>(x);
}
template <class T>
static inline T convert(double x) {
  return static_cast<T>(x);
}
template <class T>
static inline T convert(Bf16 x) {
  return static_cast<T>(bits_to_float(static_cast<uint32_t>(x.bits) << 16));
}
// Branch-free, so that loops over it vectorise. Subnormals go through an integer conversion: they stay exact where the
// processor flushes float32 subnormals to zero.
template <class T>
static inline T convert(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  const float normal = bits_to_float((magnitude << 13) + (112u << 23));
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float value = magnitude < 0x400u ? subnormal : normal;
  return static_cast<T>(bits_to_float(__builtin_bit_cast(uint32_t, value) | special | sign));
}

// Calls f with a null pointer of the stored type: visit(type, [&](auto* tag) { ... *tag's type ... }).
template <class F>
static inline void visit(Element type, F f) {
  switch (type) {
    case Element::f32:
      return f(static_cast<const float*>(nullptr));
    case Element::f64:
      return f(static_cast<const double*>(nullptr));
    case Element::bf16:
      return f(static_cast<const Bf16*>(nullptr));
    case Element::f16:
      return f(static_cast<const F16*>(nullptr));
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA
