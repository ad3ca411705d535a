// (F_i + damping_i I)^-1 for a ragged list of symmetric matrices.
#include "cuda/damped_inverse.h"

#include <numeric>
#include <tuple>

#include "cuda/glue.h"

namespace kronfac::cuda {
namespace {

std::tuple<std::vector<Tensor>, Tensor> damped_inverse(std::vector<Tensor> factors, Tensor damping) {
  check_damped_inverse(factors, damping);
  const OnDeviceOf device(damping);
  const ScalarType type = damping.scalar_type();
  std::vector<Tensor> inverses;
  for (const Tensor& factor : factors) inverses.push_back(empty_like(damping, {factor.size(0), factor.size(0)}, type));
  Tensor info = empty_like(damping, {static_cast<int64_t>(factors.size())}, ScalarType::Int);
  info = torch::stable::zero_(info);

  // By descending order, so that small and large matrices come apart, and what is left of a batch is its beginning.
  std::vector<size_t> order(factors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return factors[a].size(0) > factors[b].size(0); });
  InverseBatch batch{};
  batch.damping = damping.const_data_ptr();
  batch.damping_stride = damping.dim() == 0 ? 0 : damping.stride(0);
  batch.info = factors.empty() ? nullptr : info.mutable_data_ptr<int32_t>();
  std::vector<Tensor> memory;
  const auto launch = [&] {
    invert_batch(element_of(damping), batch, device.stream());
    batch.count = 0;
  };
  for (const size_t i : order) {
    const int64_t n = factors[i].size(0), work = inverse_work(n);
    if (n == 0) break;
    if (batch.count == kMostMatrices || (batch.count > 0 && batch.problem[0].n > kSmallOrder && n <= kSmallOrder)) {
      launch();
    }
    memory.push_back(empty_like(damping, {work}, type));
    batch.problem[batch.count++] = {factors[i].const_data_ptr(),
                                    factors[i].stride(0),
                                    factors[i].stride(1),
                                    inverses[i].mutable_data_ptr(),
                                    memory.back().mutable_data_ptr(),
                                    static_cast<int32_t>(n),
                                    static_cast<int32_t>(i)};
  }
  launch();
  return {inverses, info};
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "damped_inverse", TORCH_BOX(&kronfac::cuda::damped_inverse));
}
