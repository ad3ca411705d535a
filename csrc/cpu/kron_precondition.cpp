// out_i = left_i grad_i right_i and <out_i, grad_i>, all layers in one call.
#include <tuple>

#include "cpu/two_sided.h"

namespace kronfac::cpu {
namespace {

template <class T>
void precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& left, const std::vector<Tensor>& right,
                  const std::vector<Tensor>& out, T* dots) {
  const Kernels<T> kernels;
  std::vector<Layer> layers;
  std::vector<kernels::Matrix> grad_views, left_views, right_views;
  std::vector<std::byte*> out_data;
  for (size_t l = 0; l < grads.size(); ++l) {
    layers.push_back({grads[l].size(0), grads[l].size(1)});
    grad_views.push_back(matrix_of(grads[l]));
    left_views.push_back(matrix_of(left[l]));
    right_views.push_back(matrix_of(right[l]));
    out_data.push_back(static_cast<std::byte*>(out[l].mutable_data_ptr()));
  }
  const int64_t threads = threads_for(layers);
  const std::vector<Slice> slices = cut(layers, threads, kernels.blocks);
  const SliceScratch sizes = scratch_for(kernels, slices, layers);
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(slices.size())));
  const Scratch scratch(sizes.bytes() * workers);
  std::vector<double> partial(slices.size());

  run_tasks(slices_largest_first(slices, layers), workers, [&](int64_t task, int64_t worker) {
    const Slice& s = slices[static_cast<size_t>(task)];
    const Layer& layer = layers[s.layer];
    const kernels::Matrix& grad = grad_views[s.layer];
    const int64_t rows = s.by_columns ? layer.rows : s.width(), columns = s.by_columns ? s.width() : layer.columns;
    const int64_t row0 = s.by_columns ? 0 : s.lo, column0 = s.by_columns ? s.lo : 0;
    const int64_t base = worker * sizes.bytes(), size = element_size(grad.type);
    std::byte* target = out_data[s.layer] + (row0 * layer.columns + column0) * size;
    const bool in_place = grad.type == Kernels<T>::element;
    T* c = in_place ? reinterpret_cast<T*>(target) : scratch.at<T>(base + sizes.inner);
    const int64_t ldc = in_place ? layer.columns : columns;
    two_sided(kernels, s, layer, left_views[s.layer], grad, right_views[s.layer], scratch.at<T>(base), c, ldc,
              scratch.at(base + sizes.inner + sizes.outer));
    partial[static_cast<size_t>(task)] =
        kernels.precondition.dot(rows, columns, c, ldc, shifted(grad, row0, column0, size));
    if (!in_place) kernels.precondition.round(rows, columns, c, ldc, grad.type, target, layer.columns);
  });

  std::vector<double> totals(grads.size());
  for (size_t i = 0; i < slices.size(); ++i) totals[slices[i].layer] += partial[i];
  for (size_t l = 0; l < totals.size(); ++l) dots[l] = static_cast<T>(totals[l]);
}

std::tuple<std::vector<Tensor>, Tensor> kron_precondition(std::vector<Tensor> grads, std::vector<Tensor> left,
                                                          std::vector<Tensor> right) {
  check_kron_precondition(grads, left, right);
  std::vector<Tensor> out;
  for (const Tensor& grad : grads) out.push_back(empty_matrix(grad.size(0), grad.size(1), grad.scalar_type()));
  const ScalarType type = left.empty() ? ScalarType::Float : left[0].scalar_type();
  const Tensor dots = empty_vector(static_cast<int64_t>(grads.size()), type);
  if (type == ScalarType::Double) {
    precondition(grads, left, right, out, dots.mutable_data_ptr<double>());
  } else {
    precondition(grads, left, right, out, dots.mutable_data_ptr<float>());
  }
  return {out, dots};
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "kron_precondition", TORCH_BOX(&kronfac::cpu::kron_precondition));
}
