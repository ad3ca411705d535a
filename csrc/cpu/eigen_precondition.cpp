// out_i = Q_L [(Q_L^T grad_i Q_R) / (E + damping_i)] Q_R^T and <out_i, grad_i>, all layers in one call.
#include <tuple>

#include "cpu/two_sided.h"

namespace kronfac::cpu {
namespace {

constexpr const char* kOp = "eigen_precondition";

template <class T>
void precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& left, const std::vector<Tensor>& right,
                  const std::vector<Tensor>& eigenvalues, const std::vector<double>& damping,
                  const std::vector<Tensor>& out, T* dots) {
  const Kernels<T> kernels;
  std::vector<Layer> layers;
  std::vector<kernels::Matrix> grad_views, left_views, right_views, spectra;
  std::vector<std::byte*> out_data;
  for (size_t l = 0; l < grads.size(); ++l) {
    layers.push_back({grads[l].size(0), grads[l].size(1)});
    grad_views.push_back(matrix_of(grads[l]));
    left_views.push_back(matrix_of(left[l]));
    right_views.push_back(matrix_of(right[l]));
    spectra.push_back(matrix_of(eigenvalues[l]));
    out_data.push_back(static_cast<std::byte*>(out[l].mutable_data_ptr()));
  }
  const int64_t threads = threads_for(layers);
  const std::vector<Slice> slices = cut(layers, threads, kernels.blocks);
  const SliceScratch sizes = scratch_for(kernels, slices, layers);
  const int64_t workers = std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(slices.size())));

  // A layer in one slice is finished by one task. The others go to the eigenbasis and back in two rounds, because the
  // way back needs every entry there; theirs is the memory for the whole gradient in between.
  std::vector<int64_t> middle_offset(layers.size());
  int64_t middle_size = 0, whole_size = 0;
  for (const Slice& s : slices) {
    const int64_t area = layers[s.layer].rows * layers[s.layer].columns;
    if (s.whole) {
      whole_size = std::max(whole_size, area);
    } else if (s.lo == 0) {
      middle_offset[s.layer] = middle_size;
      middle_size += area;
    }
  }
  const int64_t whole_bytes = Scratch::rounded(whole_size * static_cast<int64_t>(sizeof(T)));
  const int64_t worker_bytes = sizes.bytes() + whole_bytes;
  const Scratch scratch(worker_bytes * workers), middle(middle_size * static_cast<int64_t>(sizeof(T)));
  std::vector<double> partial(slices.size());

  const auto middle_of = [&](const Slice& s, int64_t worker) {
    return s.whole ? scratch.at<T>(worker * worker_bytes + sizes.bytes()) : middle.at<T>() + middle_offset[s.layer];
  };
  const auto to_eigenbasis = [&](int64_t task, int64_t worker) {
    const Slice& s = slices[static_cast<size_t>(task)];
    const Layer& layer = layers[s.layer];
    const int64_t rows = s.by_columns ? layer.rows : s.width(), columns = s.by_columns ? s.width() : layer.columns;
    const int64_t row0 = s.by_columns ? 0 : s.lo, column0 = s.by_columns ? s.lo : 0, base = worker * worker_bytes;
    T* c = middle_of(s, worker) + row0 * layer.columns + column0;
    two_sided(kernels, s, layer, left_views[s.layer].transposed(), grad_views[s.layer], right_views[s.layer],
              scratch.at<T>(base), c, layer.columns, scratch.at(base + sizes.inner + sizes.outer));
    const kernels::Matrix e = shifted(spectra[s.layer], row0, column0, static_cast<int64_t>(sizeof(T)));
    // <Q_L P Q_R^T, grad> = <P, Q_L^T grad Q_R>: the inner product is there already, and it sums terms of one sign.
    partial[static_cast<size_t>(task)] =
        kernels.precondition.divide(rows, columns, c, layer.columns, static_cast<const T*>(e.data), e.row_stride,
                                    e.col_stride, static_cast<T>(damping[s.layer]));
  };
  const auto back = [&](int64_t task, int64_t worker) {
    const Slice& s = slices[static_cast<size_t>(task)];
    const Layer& layer = layers[s.layer];
    const kernels::Element type = grad_views[s.layer].type;
    const int64_t rows = s.by_columns ? layer.rows : s.width(), columns = s.by_columns ? s.width() : layer.columns;
    const int64_t row0 = s.by_columns ? 0 : s.lo, column0 = s.by_columns ? s.lo : 0, base = worker * worker_bytes;
    std::byte* target = out_data[s.layer] + (row0 * layer.columns + column0) * element_size(type);
    const bool in_place = type == Kernels<T>::element;
    T* c = in_place ? reinterpret_cast<T*>(target) : scratch.at<T>(base + sizes.inner);
    const int64_t ldc = in_place ? layer.columns : columns;
    two_sided(kernels, s, layer, left_views[s.layer], dense(middle_of(s, worker), layer.columns),
              right_views[s.layer].transposed(), scratch.at<T>(base), c, ldc,
              scratch.at(base + sizes.inner + sizes.outer));
    if (!in_place) kernels.precondition.round(rows, columns, c, ldc, type, target, layer.columns);
  };

  const std::vector<int64_t> order = slices_largest_first(slices, layers);
  run_tasks(order, workers, [&](int64_t task, int64_t worker) {
    to_eigenbasis(task, worker);
    if (slices[static_cast<size_t>(task)].whole) back(task, worker);
  });
  std::vector<int64_t> second;
  for (const int64_t task : order) {
    if (!slices[static_cast<size_t>(task)].whole) second.push_back(task);
  }
  run_tasks(second, workers, back);

  std::vector<double> totals(grads.size());
  for (size_t i = 0; i < slices.size(); ++i) totals[slices[i].layer] += partial[i];
  for (size_t l = 0; l < totals.size(); ++l) dots[l] = static_cast<T>(totals[l]);
}

std::tuple<std::vector<Tensor>, Tensor> eigen_precondition(std::vector<Tensor> grads, std::vector<Tensor> left_vectors,
                                                           std::vector<Tensor> right_vectors,
                                                           std::vector<Tensor> eigenvalues, Tensor damping) {
  check_eigen_precondition(grads, left_vectors, right_vectors, eigenvalues, damping);
  const std::vector<double> values = read_damping(kOp, damping, grads.size());
  std::vector<Tensor> out;
  for (const Tensor& grad : grads) out.push_back(empty_matrix(grad.size(0), grad.size(1), grad.scalar_type()));
  const Tensor dots = empty_vector(static_cast<int64_t>(grads.size()), damping.scalar_type());
  if (damping.scalar_type() == ScalarType::Double) {
    precondition(grads, left_vectors, right_vectors, eigenvalues, values, out, dots.mutable_data_ptr<double>());
  } else {
    precondition(grads, left_vectors, right_vectors, eigenvalues, values, out, dots.mutable_data_ptr<float>());
  }
  return {out, dots};
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "eigen_precondition", TORCH_BOX(&kronfac::cpu::eigen_precondition));
}
