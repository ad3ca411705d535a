// The checks of conv_covariance and conv_covariance_ that are the same on every device.
#pragma once

#include "common/checks.h"
#include "common/conv_shape.h"

namespace kronfac {

inline std::string list_string(const std::vector<int64_t>& list) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < list.size(); ++i) s << (i ? ", " : "") << list[i];
  s << ']';
  return s.str();
}

inline void check_list(const char* op, const char* arg, const std::vector<int64_t>& list, size_t axes, int64_t least) {
  STD_TORCH_CHECK(list.size() == axes, "kronfac::", op, ": ", arg, ": expected ", axes,
                  " entries, one for each spatial axis of x, got ", list_string(list));
  for (const int64_t entry : list) {
    STD_TORCH_CHECK(entry >= least, "kronfac::", op, ": ", arg, ": expected entries >= ", least, ", got ",
                    list_string(list));
  }
}

inline ConvShape check_conv_input(const char* op, const Tensor& x, const std::vector<int64_t>& kernel_size,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups, bool bias, double scale) {
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

  ConvShape shape{};
  shape.images = x.size(0);
  shape.groups = groups;
  shape.channels = x.size(1) / groups;
  shape.bias = bias;
  const size_t absent = 3 - axes;
  for (size_t axis = 0; axis < absent; ++axis) {
    shape.size[axis] = shape.kernel[axis] = shape.step[axis] = shape.dilation[axis] = shape.out[axis] = 1;
  }
  const bool one_sided = padding.size() == 2 * axes;
  for (size_t i = 0; i < axes; ++i) {
    const size_t axis = absent + i;
    shape.size[axis] = x.size(static_cast<int64_t>(i) + 2);
    shape.kernel[axis] = kernel_size[i];
    shape.step[axis] = stride[i];
    shape.dilation[axis] = dilation[i];
    shape.low[axis] = one_sided ? padding[2 * i] : padding[i];
    shape.high[axis] = one_sided ? padding[2 * i + 1] : padding[i];
    const int64_t padded = shape.size[axis] + shape.low[axis] + shape.high[axis],
                  reach = dilation[i] * (kernel_size[i] - 1) + 1;
    STD_TORCH_CHECK(padded >= reach, "kronfac::", op,
                    ": kernel_size: expected the dilated kernel to fit into the padded x, got ", reach, " > ", padded,
                    " on spatial axis ", i);
    shape.out[axis] = (padded - reach) / stride[i] + 1;
  }
  return shape;
}

inline std::vector<int64_t> conv_output_shape(const ConvShape& shape) {
  const int64_t d = shape.d();
  return shape.groups > 1 ? std::vector<int64_t>{shape.groups, d, d} : std::vector<int64_t>{d, d};
}

// What conv_covariance_ asks of `out`, after check_conv_input.
inline void check_conv_output(const char* op, const Tensor& out, const Tensor& x, const ConvShape& shape,
                              double decay) {
  check_weight(op, "decay", decay);
  const std::vector<int64_t> expected = conv_output_shape(shape);
  bool same = out.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = out.size(static_cast<int64_t>(i)) == expected[i];
  STD_TORCH_CHECK(same, "kronfac::", op, ": out: expected shape ", list_string(expected), ", got ", shape_string(out));
  check_dtype(op, "out", out, accumulation_type(x.scalar_type()), "what covariances of this x come out as");
  check_device(op, "out", out, x, "x");
  check_writable(op, "out", out);
}

}  // namespace kronfac
