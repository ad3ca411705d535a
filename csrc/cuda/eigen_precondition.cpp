// out_i = Q_L [(Q_L^T grad_i Q_R) / (E + damping_i)] Q_R^T and <out_i, grad_i>, all small layers in five launches,
// large ones by cuBLAS.
#include <functional>
#include <tuple>

#include "cuda/layers.h"

namespace kronfac::cuda {
namespace {

std::tuple<std::vector<Tensor>, Tensor> eigen_precondition(std::vector<Tensor> grads, std::vector<Tensor> left_vectors,
                                                           std::vector<Tensor> right_vectors,
                                                           std::vector<Tensor> eigenvalues, Tensor damping) {
  check_eigen_precondition(grads, left_vectors, right_vectors, eigenvalues, damping);
  const OnDeviceOf device(damping);
  const ScalarType type = damping.scalar_type();
  const bool wide = type == ScalarType::Double;
  std::vector<Tensor> out;
  for (const Tensor& grad : grads) out.push_back(empty_like(grad, {grad.size(0), grad.size(1)}, grad.scalar_type()));
  const Tensor dots = empty_like(damping, {static_cast<int64_t>(grads.size())}, type);
  const int64_t damping_stride = damping.dim() == 0 ? 0 : damping.stride(0);
  const auto is_large = [&](size_t l) { return large(grads, l); };
  each_batch(grads, is_large, [&](const std::vector<size_t>& layers) {
    std::vector<LargeLayer> list;
    for (const size_t l : layers) {
      list.push_back({view_of(grads[l]), view_of(left_vectors[l]), view_of(right_vectors[l]), view_of(eigenvalues[l]),
                      out[l].mutable_data_ptr(), grads[l].size(0), grads[l].size(1), static_cast<int32_t>(l)});
    }
    LargeLaunches launches(damping, grads[layers[0]], wide, dots.mutable_data_ptr(), device.stream());
    LargeChain(list, launches).eigen(damping.const_data_ptr(), damping_stride);
  });
  std::vector<Tensor> inner(grads.size(), dots), middle(grads.size(), dots);
  each_batch(grads, std::not_fn(is_large), [&](const std::vector<size_t>& layers) {
    for (const size_t l : layers) {
      for (std::vector<Tensor>* memory : {&inner, &middle}) {
        (*memory)[l] = empty_like(grads[l], {grads[l].size(0), grads[l].size(1)}, type);
      }
    }
    ProductBatch batch{};
    batch.damping = damping.const_data_ptr();
    batch.damping_stride = damping_stride;
    const auto products = [&](const auto& set) { return set_products(batch, grads, layers, wide, set); };
    const Element grad_type = element_of(grads[layers[0]]);
    const int32_t tiles = products([&](Product& p, size_t l, int64_t rows, int64_t columns) {
      set_product(p, view_of(left_vectors[l]).transposed(), view_of(grads[l]), rows, rows, columns,
                  inner[l].mutable_data_ptr());
    });
    const Tensor partial = empty_like(damping, {tiles}, ScalarType::Double);
    batch.partial = partial.mutable_data_ptr<double>();
    product(batch, Finish::store, grad_type, wide, true, device.stream());
    // <Q_L P Q_R^T, grad> = <P, Q_L^T grad Q_R>: the sum is there already, and its terms are of one sign.
    products([&](Product& p, size_t l, int64_t rows, int64_t columns) {
      set_product(p, view_of(inner[l]), view_of(right_vectors[l]), rows, columns, columns,
                  middle[l].mutable_data_ptr());
      p.other = eigenvalues[l].const_data_ptr();
      p.other_row = eigenvalues[l].stride(0), p.other_column = eigenvalues[l].stride(1);
    });
    product(batch, Finish::divide, grad_type, wide, false, device.stream());
    product_dots(batch, wide, dots.mutable_data_ptr(), device.stream());
    products([&](Product& p, size_t l, int64_t rows, int64_t columns) {
      set_product(p, view_of(left_vectors[l]), view_of(middle[l]), rows, rows, columns, inner[l].mutable_data_ptr());
    });
    product(batch, Finish::store, grad_type, wide, false, device.stream());
    products([&](Product& p, size_t l, int64_t rows, int64_t columns) {
      set_product(p, view_of(inner[l]), view_of(right_vectors[l]).transposed(), rows, columns, columns,
                  out[l].mutable_data_ptr());
    });
    product(batch, Finish::rounded, grad_type, wide, false, device.stream());
  });
  return {out, dots};
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "eigen_precondition", TORCH_BOX(&kronfac::cuda::eigen_precondition));
}
