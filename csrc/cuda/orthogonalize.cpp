// w <- w - V^T (V w), several times.
#include "cuda/orthogonalize.h"

#include "cuda/glue.h"

namespace kronfac::cuda {
namespace {

Tensor orthogonalize_(Tensor w, Tensor basis, int64_t passes) {
  check_orthogonalize(w, basis, passes);
  const OnDeviceOf device(w);
  Orthogonalize p{};
  p.type = element_of(w), p.m = basis.size(0), p.n = w.size(0), p.passes = passes;
  Tensor coefficients = empty_like(w, {p.m}, w.scalar_type());
  if (p.m == 0 || p.n == 0) return torch::stable::zero_(coefficients);
  p.w = w.mutable_data_ptr(), p.w_stride = w.stride(0);
  p.v = basis.const_data_ptr(), p.row_stride = basis.stride(0), p.column_stride = basis.stride(1);
  p.coefficients = coefficients.mutable_data_ptr();
  p.width = orthogonalize_width(p.m, element_bytes(w.scalar_type()));
  p.blocks = (p.n + p.width - 1) / p.width;
  const Tensor memory = empty_like(w, {p.m * (p.blocks + 2)}, ScalarType::Double);
  p.latest = memory.mutable_data_ptr<double>();
  p.total = p.latest + p.m;
  p.partial = p.total + p.m;
  orthogonalize(p, device.stream());
  return coefficients;
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "orthogonalize_", TORCH_BOX(&kronfac::cuda::orthogonalize_));
}
