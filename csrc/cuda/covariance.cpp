// out <- decay * out + scale * [x 1]^T [x 1].
#include "cuda/covariance_plan.h"
#include "cuda/glue.h"

namespace kronfac::cuda {
namespace {

void set_input(Covariance& p, const Tensor& x) {
  p.x = x.const_data_ptr(), p.row = x.stride(0), p.feature = x.stride(1);
}

// A copy of x whose rows begin at multiples of 16 bytes.
Tensor with_aligned_rows(const Tensor& x) {
  const int64_t m = x.size(0), features = x.size(1), run = 16 / element_bytes(x.scalar_type());
  Tensor memory = empty_like(x, {m, (features + run - 1) / run * run}, x.scalar_type());
  Tensor rows = torch::stable::narrow(memory, 1, 0, features);
  torch::stable::copy_(rows, x);
  return rows;
}

void covariance_into(const Tensor& out, const Tensor& x, bool bias, double decay, double scale, Stream stream) {
  Covariance p{};
  p.type = element_of(x), p.m = x.size(0), p.features = x.size(1), p.bias = bias, p.decay = decay, p.scale = scale;
  p.out = out.mutable_data_ptr(), p.out_row = out.stride(0), p.out_column = out.stride(1), p.parts = 1;
  p.tensor_cores = is_narrow(x.scalar_type()) || (p.type == Element::f32 && tf32_allowed());
  set_input(p, x);
  const bool large = available() && covariance_large(p);
  const Tensor input = covariance_needs_copy(p, large) ? with_aligned_rows(x) : x;
  set_input(p, input);
  if (large && plain_matrix(p)) {
    const CovariancePanels panels = covariance_panels(p);
    const Tensor partial = empty_like(out, {panels.entries}, out.scalar_type());
    p.partial = partial.mutable_data_ptr();
    run(covariance_products(p, panels));
    covariance_finish(p, panels, stream);
    return;
  }
  p.parts = covariance_parts(p);
  const Tensor partial = empty_like(out, {p.parts > 1 ? p.parts : 0, p.d(), p.d()}, out.scalar_type());
  p.partial = partial.mutable_data_ptr();
  covariance(p, stream);
}

Tensor new_covariance(Tensor x, bool bias, double scale) {
  check_covariance_input("covariance", x, scale);
  const OnDeviceOf device(x);
  const int64_t d = x.size(1) + (bias ? 1 : 0);
  const Tensor out = empty_like(x, {d, d}, accumulation_type(x.scalar_type()));
  covariance_into(out, x, bias, 0, scale, device.stream());
  return out;
}

void update_covariance(Tensor out, Tensor x, bool bias, double decay, double scale) {
  check_covariance(out, x, bias, decay, scale);
  const OnDeviceOf device(x);
  covariance_into(out, apart_from(out, x), bias, decay, scale, device.stream());
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "covariance", TORCH_BOX(&kronfac::cuda::new_covariance));
  kronfac::implement(m, "covariance_", TORCH_BOX(&kronfac::cuda::update_covariance));
}
