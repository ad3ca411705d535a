// One Gemm of csrc/cuda/blas.h by loops on the CPU, with sums in float32 or float64 as there: what tests run plans
// with.
#pragma once

#include "cuda/blas.h"
#include "cuda/block.cuh"

namespace kronfac::cuda {

inline double entry(const void* data, Element type, int64_t at) {
  switch (type) {
    case Element::f64:
      return static_cast<const double*>(data)[at];
    case Element::bf16:
      return widened<double>(static_cast<const BFloat16*>(data)[at]);
    case Element::f16:
      return widened<double>(static_cast<const Half*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

inline void set_entry(void* data, Element type, int64_t at, double value) {
  switch (type) {
    case Element::f64:
      static_cast<double*>(data)[at] = value;
      return;
    case Element::bf16:
      static_cast<BFloat16*>(data)[at] = Narrowed<BFloat16, double>::of(value);
      return;
    case Element::f16:
      static_cast<Half*>(data)[at] = Narrowed<Half, double>::of(value);
      return;
    default:
      static_cast<float*>(data)[at] = static_cast<float>(value);
  }
}

inline int64_t bytes_of(Element type) { return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2; }

inline void execute(const Gemm& g) {
  for (int64_t number = 0; number < g.count; ++number) {
    const auto of = [&](const void* data, Element type, int64_t stride) {
      return g.pointers ? static_cast<const void* const*>(data)[number]
                        : static_cast<const char*>(data) + number * stride * bytes_of(type);
    };
    const void* const a = of(g.a, g.type, g.a_stride);
    const void* const b = of(g.b, g.type, g.b_stride);
    void* const c = const_cast<void*>(of(g.c, g.c_type, g.c_stride));
    for (int64_t j = 0; j < g.n; ++j) {
      for (int64_t i = 0; i < g.m; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < g.k; ++k) {
          sum += entry(a, g.type, g.a_transposed ? k + i * g.lda : i + k * g.lda) *
                 entry(b, g.type, g.b_transposed ? j + k * g.ldb : k + j * g.ldb);
          if (g.type != Element::f64) sum = static_cast<float>(sum);
        }
        const int64_t at = i + j * g.ldc;
        const double old = g.beta == 0 ? 0 : g.beta * entry(c, g.c_type, at);
        set_entry(c, g.c_type, at, g.alpha * sum + old);
      }
    }
  }
}

}  // namespace kronfac::cuda
