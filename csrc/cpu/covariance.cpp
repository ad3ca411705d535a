// out <- decay * out + scale * [x 1]^T [x 1].
#include "cpu/symmetric.h"

namespace kronfac::cpu {
namespace {

void check_input(const char* op, const Tensor& x, double scale) {
  check_floating(op, "x", x);
  check_dim(op, "x", x, 2, "(m, d)");
  check_weight(op, "scale", scale);
}

template <class T>
void covariance_into(const Tensor& out, const Tensor& x, double decay, double scale,
                     kernels::CovarianceUpdate<T> update) {
  const kernels::CovarianceInput input{matrix_of(x), x.size(1)};
  symmetric_sum<T>(symmetric_output(out, 1), x.size(0), decay, scale,
                   [&](int64_t, int64_t k0, int64_t k1, int64_t row0, int64_t row1, T* sum, int64_t ld, void* scratch) {
                     update(input, k0, k1, row0, row1, sum, ld, scratch);
                   });
}

void covariance_into(const Tensor& out, const Tensor& x, double decay, double scale) {
  if (out.scalar_type() == ScalarType::Double) {
    covariance_into<double>(out, x, decay, scale, kernels::table().covariance_f64);
  } else {
    covariance_into<float>(out, x, decay, scale, kernels::table().covariance_f32);
  }
}

Tensor covariance(Tensor x, bool bias, double scale) {
  check_input("covariance", x, scale);
  const int64_t d = x.size(1) + (bias ? 1 : 0);
  const Tensor out = torch::stable::empty({d, d}, accumulation_type(x.scalar_type()));
  covariance_into(out, x, 0, scale);
  return out;
}

void covariance_(Tensor out, Tensor x, bool bias, double decay, double scale) {
  constexpr const char* op = "covariance_";
  check_input(op, x, scale);
  check_weight(op, "decay", decay);
  const int64_t d = x.size(1) + (bias ? 1 : 0);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == d && out.size(1) == d, "kronfac::", op, ": out: expected shape (", d,
                  ", ", d, ") for x of shape ", shape_string(x), bias ? " with bias" : "", ", got ", shape_string(out));
  check_dtype(op, "out", out, accumulation_type(x.scalar_type()), "what covariances of this x come out as");
  check_device(op, "out", out, x, "x");
  check_writable(op, "out", out);
  covariance_into(out, apart_from(out, x), decay, scale);
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  m.impl("covariance", TORCH_BOX(&kronfac::cpu::covariance));
  m.impl("covariance_", TORCH_BOX(&kronfac::cpu::covariance_));
}
