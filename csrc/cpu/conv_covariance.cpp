// out <- decay * out + scale * sum over the patches p of x of [p 1]^T [p 1], per group of channels.
#include <sstream>

#include "cpu/conv_covariance_shift.h"
#include "cpu/symmetric.h"

namespace kronfac::cpu {
namespace {

using Sizes = std::vector<int64_t>;

std::string list_string(const Sizes& list) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < list.size(); ++i) s << (i ? ", " : "") << list[i];
  s << ']';
  return s.str();
}

void check_list(const char* op, const char* arg, const Sizes& list, size_t axes, int64_t least) {
  STD_TORCH_CHECK(list.size() == axes, "kronfac::", op, ": ", arg, ": expected ", axes,
                  " entries, one for each spatial axis of x, got ", list_string(list));
  for (const int64_t entry : list) {
    STD_TORCH_CHECK(entry >= least, "kronfac::", op, ": ", arg, ": expected entries >= ", least, ", got ",
                    list_string(list));
  }
}

// A checked call: what the kernels read of one group, and the sizes of the result.
struct Problem {
  kernels::ConvInput input;  // of group 0
  int64_t images, groups, group_stride, positions, d;
};

Problem check_input(const char* op, const Tensor& x, const Sizes& kernel_size, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation, int64_t groups, bool bias, double scale) {
  check_floating(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "kronfac::", op,
                  ": x: expected a tensor (N, C, *spatial) with 1 to 3 spatial axes, got shape ", shape_string(x));
  const size_t axes = static_cast<size_t>(x.dim() - 2);
  check_list(op, "kernel_size", kernel_size, axes, 1);
  check_list(op, "stride", stride, axes, 1);
  check_list(op, "dilation", dilation, axes, 1);
  STD_TORCH_CHECK(padding.size() == axes || padding.size() == 2 * axes, "kronfac::", op, ": padding: expected ", axes,
                  " or ", 2 * axes, " entries (one, or low and high, for each spatial axis of x), got ",
                  list_string(padding));
  check_list(op, "padding", padding, padding.size(), 0);
  check_weight(op, "scale", scale);
  STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0, "kronfac::", op,
                  ": groups: expected a positive divisor of the ", x.size(1), " channels of x, got ", groups);

  Problem problem{};
  kernels::ConvInput& input = problem.input;
  input.data = x.const_data_ptr();
  input.type = element_of(x);
  input.channels = x.size(1) / groups;
  input.batch_stride = x.stride(0);
  input.channel_stride = x.stride(1);
  problem.images = x.size(0);
  problem.groups = groups;
  problem.group_stride = input.channels * input.channel_stride * element_size(input.type);
  problem.positions = x.size(0);
  const size_t absent = 3 - axes;
  for (size_t axis = 0; axis < absent; ++axis) {
    input.size[axis] = input.kernel[axis] = input.step[axis] = input.dilation[axis] = input.out[axis] = 1;
  }
  const bool one_sided = padding.size() == 2 * axes;
  for (size_t i = 0; i < axes; ++i) {
    const size_t axis = absent + i;
    const int64_t low = one_sided ? padding[2 * i] : padding[i], high = one_sided ? padding[2 * i + 1] : padding[i];
    input.size[axis] = x.size(static_cast<int64_t>(i) + 2);
    input.axis_stride[axis] = x.stride(static_cast<int64_t>(i) + 2);
    input.kernel[axis] = kernel_size[i];
    input.step[axis] = stride[i];
    input.dilation[axis] = dilation[i];
    input.low[axis] = low;
    const int64_t padded = input.size[axis] + low + high, reach = dilation[i] * (kernel_size[i] - 1) + 1;
    STD_TORCH_CHECK(padded >= reach, "kronfac::", op,
                    ": kernel_size: expected the dilated kernel to fit into the padded x, got ", reach, " > ", padded,
                    " on spatial axis ", i);
    input.out[axis] = (padded - reach) / stride[i] + 1;
    problem.positions *= input.out[axis];
  }
  problem.d = input.features() + (bias ? 1 : 0);
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

Sizes output_shape(const Problem& problem) {
  return problem.groups > 1 ? Sizes{problem.groups, problem.d, problem.d} : Sizes{problem.d, problem.d};
}

Tensor conv_covariance(Tensor x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                       bool bias, double scale) {
  const Problem problem =
      check_input("conv_covariance", x, kernel_size, stride, padding, dilation, groups, bias, scale);
  const Tensor out = torch::stable::empty(output_shape(problem), accumulation_type(x.scalar_type()));
  conv_covariance_into(out, problem, 0, scale);
  return out;
}

void conv_covariance_(Tensor out, Tensor x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                      int64_t groups, bool bias, double decay, double scale) {
  constexpr const char* op = "conv_covariance_";
  Problem problem = check_input(op, x, kernel_size, stride, padding, dilation, groups, bias, scale);
  check_weight(op, "decay", decay);
  const Sizes expected = output_shape(problem);
  bool same = out.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = out.size(static_cast<int64_t>(i)) == expected[i];
  STD_TORCH_CHECK(same, "kronfac::", op, ": out: expected shape ", list_string(expected), ", got ", shape_string(out));
  check_dtype(op, "out", out, accumulation_type(x.scalar_type()), "what covariances of this x come out as");
  check_device(op, "out", out, x, "x");
  check_writable(op, "out", out);
  const Tensor apart = apart_from(out, x);
  if (apart.const_data_ptr() != x.const_data_ptr()) {
    problem = check_input(op, apart, kernel_size, stride, padding, dilation, groups, bias, scale);
  }
  conv_covariance_into(out, problem, decay, scale);
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "conv_covariance", TORCH_BOX(&kronfac::cpu::conv_covariance));
  kronfac::implement(m, "conv_covariance_", TORCH_BOX(&kronfac::cpu::conv_covariance_));
}
