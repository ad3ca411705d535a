#include "cuda/blocked_inverse.cuh"

namespace kronfac::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kInverseThreads) factor_kernel(const __grid_constant__ BlockedBatch batch) {
  __shared__ FactorShared shared;
  DeviceBlock<FactorState> block;
  factor_block<T>(block, shared, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads) gather_kernel(const __grid_constant__ BlockedBatch batch) {
  DeviceBlock<NoState> block;
  gather_block<T>(block, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads) addresses_kernel(const __grid_constant__ BlockedBatch batch) {
  DeviceBlock<NoState> block;
  addresses_of<T>(block, batch, blockIdx.x);
}

void start(const char* name, void (*kernel)(BlockedBatch), const BlockedBatch& batch, int32_t blocks, Stream stream) {
  static_assert(sizeof(BlockedBatch) <= 4096);
  if (blocks == 0) return;
  kernel<<<static_cast<unsigned>(blocks), kInverseThreads, 0, stream>>>(batch);
  check_launch(name);
}

int32_t one(int32_t) { return 1; }

}  // namespace

void factor_pivots(Element type, BlockedBatch& batch, Stream stream) {
  const auto kernel = type == Element::f64 ? factor_kernel<double> : factor_kernel<float>;
  start("factor_pivots", kernel, batch, batch.layout(batch.part_start(), one), stream);
}

void gather_pivots(Element type, BlockedBatch& batch, Stream stream) {
  const auto kernel = type == Element::f64 ? gather_kernel<double> : gather_kernel<float>;
  const int32_t blocks = batch.layout(batch.start(), [&](int32_t n) { return batch.gathers(n); });
  start("gather_pivots", kernel, batch, blocks, stream);
}

void blocked_addresses(Element type, BlockedBatch& batch, Stream stream) {
  const auto kernel = type == Element::f64 ? addresses_kernel<double> : addresses_kernel<float>;
  start("blocked_addresses", kernel, batch, batch.layout(0, one), stream);
}

}  // namespace kronfac::cuda
