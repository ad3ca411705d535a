// out_i = left_i grad_i right_i and <out_i, grad_i>, all small layers in three launches, large ones by cuBLAS.
#include <functional>
#include <tuple>

#include "cuda/layers.h"

namespace kronfac::cuda {
namespace {

std::tuple<std::vector<Tensor>, Tensor> kron_precondition(std::vector<Tensor> grads, std::vector<Tensor> left,
                                                          std::vector<Tensor> right) {
  check_kron_precondition(grads, left, right);
  // Without a tensor there is no device, and no call ends here.
  STD_TORCH_CHECK(!grads.empty(),
                  "kronfac::kron_precondition: grads: expected at least one tensor on the GPU, got none");
  const OnDeviceOf device(grads[0]);
  const ScalarType type = left[0].scalar_type();
  const bool wide = type == ScalarType::Double;
  std::vector<Tensor> out;
  for (const Tensor& grad : grads) out.push_back(empty_like(grad, {grad.size(0), grad.size(1)}, grad.scalar_type()));
  const Tensor dots = empty_like(grads[0], {static_cast<int64_t>(grads.size())}, type);
  const auto is_large = [&](size_t l) { return large(grads, l); };
  each_batch(grads, is_large, [&](const std::vector<size_t>& layers) {
    std::vector<LargeLayer> list;
    for (const size_t l : layers) {
      list.push_back({view_of(grads[l]),
                      view_of(left[l]),
                      view_of(right[l]),
                      {},
                      out[l].mutable_data_ptr(),
                      grads[l].size(0),
                      grads[l].size(1),
                      static_cast<int32_t>(l)});
    }
    LargeLaunches launches(grads[0], grads[layers[0]], wide, dots.mutable_data_ptr(), device.stream());
    LargeChain(list, launches).kron();
  });
  std::vector<Tensor> inner(grads.size(), dots);
  each_batch(grads, std::not_fn(is_large), [&](const std::vector<size_t>& layers) {
    for (const size_t l : layers) inner[l] = empty_like(grads[l], {grads[l].size(0), grads[l].size(1)}, type);
    ProductBatch batch{};
    const auto products = [&](const auto& set) { return set_products(batch, grads, layers, wide, set); };
    const Element grad_type = element_of(grads[layers[0]]);
    const int32_t tiles = products([&](Product& p, size_t l, int64_t rows, int64_t columns) {
      set_product(p, view_of(left[l]), view_of(grads[l]), rows, rows, columns, inner[l].mutable_data_ptr());
    });
    const Tensor partial = empty_like(grads[0], {tiles}, ScalarType::Double);
    batch.partial = partial.mutable_data_ptr<double>();
    product(batch, Finish::store, grad_type, wide, true, device.stream());
    products([&](Product& p, size_t l, int64_t rows, int64_t columns) {
      set_product(p, view_of(inner[l]), view_of(right[l]), rows, columns, columns, out[l].mutable_data_ptr());
      p.other = grads[l].const_data_ptr(), p.other_row = grads[l].stride(0), p.other_column = grads[l].stride(1);
    });
    product(batch, Finish::dot, grad_type, wide, false, device.stream());
    product_dots(batch, wide, dots.mutable_data_ptr(), device.stream());
  });
  return {out, dots};
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "kron_precondition", TORCH_BOX(&kronfac::cuda::kron_precondition));
}
