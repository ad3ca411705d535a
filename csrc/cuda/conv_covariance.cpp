// out <- decay * out + scale * sum over the patches p of x of [p 1]^T [p 1], per group of channels.
#include <cstdlib>
#include <optional>

#include "common/conv_arguments.h"
#include "cuda/blas.h"
#include "cuda/conv_covariance_plan.h"
#include "cuda/glue.h"

namespace kronfac::cuda {
namespace {

using Sizes = std::vector<int64_t>;

// The variable by which the forms are compared; the forms of single axes that it may name on the CPU do not exist here.
std::optional<ConvForm> wished_form() {
  const char* variable = std::getenv("KRONFAC_CONV_COVARIANCE");
  const std::string value = variable == nullptr ? "" : variable;
  if (value.empty()) return {};
  if (value == "direct") return ConvForm::direct;
  STD_TORCH_CHECK(value == "shift" || value.compare(0, 6, "shift:") == 0,
                  "kronfac::conv_covariance: KRONFAC_CONV_COVARIANCE: expected direct or shift, got ", value,
                  "; correct the variable or unset it");
  return ConvForm::shift;
}

void upload(const std::vector<uint64_t>& table, uint64_t* target, Stream stream) {
  for (size_t first = 0; first < table.size(); first += kConvUploadWords) {
    ConvUpload p;
    p.target = target + first;
    p.count = static_cast<int32_t>(std::min<size_t>(kConvUploadWords, table.size() - first));
    std::copy_n(table.begin() + static_cast<std::ptrdiff_t>(first), p.count, p.word);
    conv_upload(p, stream);
  }
}

void conv_covariance_into(const Tensor& out, const Tensor& x, const ConvShape& shape, double decay, double scale,
                          Stream stream) {
  ConvInput input{};
  input.type = element_of(x), input.data = x.const_data_ptr(), input.image = x.stride(0), input.channel = x.stride(1);
  const int64_t absent = 5 - x.dim();
  for (int64_t axis = absent; axis < 3; ++axis) input.axis[axis] = x.stride(axis - absent + 2);
  if (absent > 0) input.axis[0] = 1;
  if (absent > 1) input.axis[1] = 1;
  input.tensor = is_narrow(x.scalar_type()) || (x.scalar_type() == ScalarType::Float && tf32_allowed());
  ConvPlan plan = plan_conv(shape, input, wished_form());
  ConvCovariance& p = plan.product;

  const std::vector<uint64_t> table = plan.table();
  const Tensor words = empty_like(out, {static_cast<int64_t>(table.size())}, ScalarType::Long);
  plan.place(static_cast<const uint64_t*>(words.const_data_ptr()));
  upload(table, static_cast<uint64_t*>(words.mutable_data_ptr()), stream);

  const Tensor map = empty_like(x, {plan.layout_size()}, x.scalar_type());
  if (plan.copied) {
    plan.layout.target = map.mutable_data_ptr();
    p.map = map.const_data_ptr();
    const int64_t bytes = element_bytes(x.scalar_type());
    plan.form == ConvForm::direct ? conv_pad(plan.layout, bytes, stream) : conv_transpose(plan.layout, bytes, stream);
  }

  const Tensor sums = empty_like(out, {plan.sums_size()}, out.scalar_type());
  p.sums = sums.mutable_data_ptr();
  p.decay = decay, p.scale = scale;
  p.out = out.mutable_data_ptr();
  p.out_group = shape.groups > 1 ? out.stride(0) : 0;
  p.out_row = out.stride(out.dim() - 2), p.out_column = out.stride(out.dim() - 1);
  conv_covariance(p, stream);
}

Tensor new_conv_covariance(Tensor x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                           bool bias, double scale) {
  const ConvShape shape =
      check_conv_input("conv_covariance", x, kernel_size, stride, padding, dilation, groups, bias, scale);
  const OnDeviceOf device(x);
  const Tensor out = empty_like(x, conv_output_shape(shape), accumulation_type(x.scalar_type()));
  conv_covariance_into(out, x, shape, 0, scale, device.stream());
  return out;
}

void update_conv_covariance(Tensor out, Tensor x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                            int64_t groups, bool bias, double decay, double scale) {
  constexpr const char* op = "conv_covariance_";
  const ConvShape shape = check_conv_input(op, x, kernel_size, stride, padding, dilation, groups, bias, scale);
  check_conv_output(op, out, x, shape, decay);
  const OnDeviceOf device(x);
  conv_covariance_into(out, apart_from(out, x), shape, decay, scale, device.stream());
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "conv_covariance", TORCH_BOX(&kronfac::cuda::new_conv_covariance));
  kronfac::implement(m, "conv_covariance_", TORCH_BOX(&kronfac::cuda::update_conv_covariance));
}
