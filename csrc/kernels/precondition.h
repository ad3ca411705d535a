// The elementwise parts of the two-sided preconditioners; the products beside them are gemm's.
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace kronfac::kernels {

template <class T>
struct PreconditionKernels {
  // sum_ij p[i, j] g[i, j] in double; p (rows, columns) has row stride ldp and unit column stride.
  double (*dot)(int64_t rows, int64_t columns, const T* p, int64_t ldp, const Matrix& g);
  // out[i, j] := p[i, j] rounded to nearest even; `type` is bf16 or f16, out has row stride ldo and unit column stride.
  void (*round)(int64_t rows, int64_t columns, const T* p, int64_t ldp, Element type, void* out, int64_t ldo);
  // t[i, j] := t[i, j] / (e[i, j] + damping); returns sum_ij t_old t_new in double. e has any strides.
  double (*divide)(int64_t rows, int64_t columns, T* t, int64_t ldt, const T* e, int64_t row_stride, int64_t col_stride,
                   T damping);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const PreconditionKernels<float> precondition_f32;
extern const PreconditionKernels<double> precondition_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
