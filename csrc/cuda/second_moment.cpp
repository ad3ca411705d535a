// out <- decay * out + scale * sum_n (sum_t g_nt [x_nt 1]^T)^2, elementwise squares.
#include "cuda/second_moment.h"

#include "cuda/glue.h"

namespace kronfac::cuda {
namespace {

void second_moment_(Tensor out, Tensor g, Tensor x, bool bias, double decay, double scale) {
  check_second_moment(out, g, x, bias, decay, scale);
  const OnDeviceOf device(g);
  g = apart_from(out, g);
  x = apart_from(out, x);
  SecondMoment p{};
  p.type = element_of(g), p.g = g.const_data_ptr(), p.x = x.const_data_ptr();
  p.g_example = g.stride(0), p.g_position = g.stride(1), p.g_feature = g.stride(2);
  p.x_example = x.stride(0), p.x_position = x.stride(1), p.x_feature = x.stride(2);
  p.examples = g.size(0), p.positions = g.size(1), p.outputs = g.size(2), p.inputs = x.size(2);
  p.bias = bias, p.decay = decay, p.scale = scale;
  p.out = out.mutable_data_ptr(), p.out_row = out.stride(0), p.out_column = out.stride(1);
  p.parts = second_moment_parts(p);
  const Tensor partial = empty_like(out, {p.parts > 1 ? p.parts : 0, p.outputs, p.columns()}, out.scalar_type());
  p.partial = partial.mutable_data_ptr();
  second_moment(p, device.stream());
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "second_moment_", TORCH_BOX(&kronfac::cuda::second_moment_));
}
