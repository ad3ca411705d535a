// out <- decay * out + scale * sum over the patches p of x of [p 1]^T [p 1], per group of channels.
#include "common/conv_arguments.h"
#include "cpu/conv_covariance_shift.h"
#include "cpu/symmetric.h"

namespace kronfac::cpu {
namespace {

using Sizes = std::vector<int64_t>;

// A checked call: what the kernels read of one group, and the sizes of the result.
struct Problem {
  kernels::ConvInput input;  // of group 0
  int64_t images, groups, group_stride, positions, d;
};

Problem make_problem(const Tensor& x, const ConvShape& shape) {
  Problem problem{};
  kernels::ConvInput& input = problem.input;
  input.data = x.const_data_ptr();
  input.type = element_of(x);
  input.channels = shape.channels;
  input.batch_stride = x.stride(0);
  input.channel_stride = x.stride(1);
  const size_t absent = static_cast<size_t>(5 - x.dim());
  for (size_t axis = 0; axis < 3; ++axis) {
    input.size[axis] = shape.size[axis];
    input.kernel[axis] = shape.kernel[axis];
    input.step[axis] = shape.step[axis];
    input.dilation[axis] = shape.dilation[axis];
    input.low[axis] = shape.low[axis];
    input.out[axis] = shape.out[axis];
    if (axis >= absent) input.axis_stride[axis] = x.stride(static_cast<int64_t>(axis - absent) + 2);
  }
  problem.images = shape.images;
  problem.groups = shape.groups;
  problem.group_stride = input.channels * input.channel_stride * element_size(input.type);
  problem.positions = shape.positions();
  problem.d = shape.d();
  return problem;
}

template <class T>
void conv_covariance_into(const Tensor& out, const Problem& problem, double decay, double scale,
                          kernels::ConvCovarianceUpdate<T> update) {
  if (const auto plan = plan_shift(problem.input, problem.images, Kernels<T>().blocks, sizeof(T))) {
    conv_covariance_shift<T>(symmetric_output(out, problem.groups), problem.input, problem.images, problem.group_stride,
                             problem.positions, problem.d > problem.input.features(), decay, scale, *plan);
    return;
  }
  symmetric_sum<T>(
      symmetric_output(out, problem.groups), problem.positions, decay, scale, thread_count(),
      [&](int64_t group, int64_t k0, int64_t k1, int64_t row0, int64_t row1, T* sum, int64_t ld, void* scratch) {
        kernels::ConvInput input = problem.input;
        input.data = static_cast<const std::byte*>(input.data) + group * problem.group_stride;
        update(input, k0, k1, row0, row1, sum, ld, scratch);
      });
}

void conv_covariance_into(const Tensor& out, const Problem& problem, double decay, double scale) {
  if (out.scalar_type() == ScalarType::Double) {
    conv_covariance_into<double>(out, problem, decay, scale, kernels::table().conv_covariance_f64);
  } else {
    conv_covariance_into<float>(out, problem, decay, scale, kernels::table().conv_covariance_f32);
  }
}

Tensor conv_covariance(Tensor x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                       bool bias, double scale) {
  const ConvShape shape =
      check_conv_input("conv_covariance", x, kernel_size, stride, padding, dilation, groups, bias, scale);
  const Tensor out = torch::stable::empty(conv_output_shape(shape), accumulation_type(x.scalar_type()));
  conv_covariance_into(out, make_problem(x, shape), 0, scale);
  return out;
}

void conv_covariance_(Tensor out, Tensor x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                      int64_t groups, bool bias, double decay, double scale) {
  constexpr const char* op = "conv_covariance_";
  const ConvShape shape = check_conv_input(op, x, kernel_size, stride, padding, dilation, groups, bias, scale);
  check_conv_output(op, out, x, shape, decay);
  const Tensor apart = apart_from(out, x);
  conv_covariance_into(out, make_problem(apart, shape), decay, scale);
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "conv_covariance", TORCH_BOX(&kronfac::cpu::conv_covariance));
  kronfac::implement(m, "conv_covariance_", TORCH_BOX(&kronfac::cpu::conv_covariance_));
}
