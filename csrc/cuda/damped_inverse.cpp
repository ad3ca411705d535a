// (F_i + damping_i I)^-1 for a ragged list of symmetric matrices.
#include <numeric>
#include <tuple>

#include "cuda/blocked_inverse.h"
#include "cuda/glue.h"

namespace kronfac::cuda {
namespace {

// What blocked_inverse() asks for, on the GPU.
class BlockedLaunches {
 public:
  BlockedLaunches(const Tensor& like, Stream stream) : like_(like), type_(element_of(like)), stream_(stream) {}

  void* memory(int64_t bytes) {
    memory_.push_back(empty_like(like_, {bytes}, ScalarType::Byte));
    return memory_.back().mutable_data_ptr();
  }
  void load(InverseBatch& batch) const { invert_part(InversePart::load, type_, batch, stream_); }
  void finish(InverseBatch& batch) const { invert_part(InversePart::finish, type_, batch, stream_); }
  void poison(InverseBatch& batch) const { invert_part(InversePart::poison, type_, batch, stream_); }
  void factor(BlockedBatch& batch) const { factor_pivots(type_, batch, stream_); }
  void gather(BlockedBatch& batch) const { gather_pivots(type_, batch, stream_); }
  void addresses(BlockedBatch& batch) const { blocked_addresses(type_, batch, stream_); }
  void products(const std::vector<Gemm>& gemms) const { run(gemms, Precision::full); }

 private:
  const Tensor& like_;
  Element type_;
  Stream stream_;
  std::vector<Tensor> memory_;
};

std::tuple<std::vector<Tensor>, Tensor> damped_inverse(std::vector<Tensor> factors, Tensor damping) {
  check_damped_inverse(factors, damping);
  const OnDeviceOf device(damping);
  const ScalarType type = damping.scalar_type();
  std::vector<Tensor> inverses;
  for (const Tensor& factor : factors) inverses.push_back(empty_like(damping, {factor.size(0), factor.size(0)}, type));
  Tensor info = empty_like(damping, {static_cast<int64_t>(factors.size())}, ScalarType::Int);
  info = torch::stable::zero_(info);

  // By descending order, so that matrices of one kind are neighbours, and what is left of a batch is its beginning.
  std::vector<size_t> order(factors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return factors[a].size(0) > factors[b].size(0); });
  InverseBatch batch{};
  batch.damping = damping.const_data_ptr();
  batch.damping_stride = damping.dim() == 0 ? 0 : damping.stride(0);
  batch.info = factors.empty() ? nullptr : info.mutable_data_ptr<int32_t>();
  // 0 for the smallest, 1 for those swept by our own kernels, 2 for those that go through cuBLAS.
  const auto kind = [](int64_t n) { return n <= kSmallOrder ? 0 : n < kBlockedOrder || !available() ? 1 : 2; };
  std::vector<Tensor> memory;
  const auto launch = [&] {
    if (batch.count > 0 && kind(batch.problem[0].n) == 2) {
      BlockedLaunches launches(damping, device.stream());
      blocked_inverse(batch, kUpdatePivots, kUpdateTile, element_of(damping), launches);
    } else {
      invert_batch(element_of(damping), batch, device.stream());
    }
    batch.count = 0;
  };
  for (const size_t i : order) {
    const int64_t n = factors[i].size(0);
    if (n == 0) break;
    if (batch.count == kMostMatrices || (batch.count > 0 && kind(batch.problem[0].n) != kind(n))) launch();
    memory.push_back(empty_like(damping, {kind(n) == 1 ? inverse_work(n) : 0}, type));
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
