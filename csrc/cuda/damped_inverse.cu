#include "cuda/damped_inverse.cuh"

namespace kronfac::cuda {
namespace {

extern __shared__ double sweep_memory[];

template <class T>
__global__ void __launch_bounds__(kInverseThreads) small_kernel(const __grid_constant__ InverseBatch batch) {
  DeviceBlock<NoState> block;
  small_inverse<T>(block, sweep_memory, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads) load_kernel(const __grid_constant__ InverseBatch batch) {
  DeviceBlock<NoState> block;
  inverse_load<T>(block, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads)
    pivots_kernel(const __grid_constant__ InverseBatch batch, int32_t step) {
  __shared__ FactorShared shared;
  DeviceBlock<FactorState> block;
  inverse_pivots<T>(block, shared, batch, blockIdx.x, step);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads)
    panel_kernel(const __grid_constant__ InverseBatch batch, int32_t step) {
  __shared__ typename InverseTile<T>::Shared shared;
  DeviceBlock<InverseState<T>> block;
  inverse_panel<T>(block, shared, batch, blockIdx.x, step);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads)
    update_kernel(const __grid_constant__ InverseBatch batch, int32_t step) {
  __shared__ typename InverseTile<T>::Shared shared;
  DeviceBlock<InverseState<T>> block;
  inverse_update<T>(block, shared, batch, blockIdx.x, step);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads) finish_kernel(const __grid_constant__ InverseBatch batch) {
  DeviceBlock<NoState> block;
  inverse_finish<T>(block, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kInverseThreads) poison_kernel(const __grid_constant__ InverseBatch batch) {
  DeviceBlock<NoState> block;
  inverse_poison<T>(block, batch, blockIdx.x);
}

template <class T>
struct Launches {
  const InverseBatch& batch;
  Stream stream;

  template <class... Arguments>
  void start(const char* name, void (*kernel)(InverseBatch, Arguments...), int32_t blocks, int64_t shared,
             Arguments... arguments) const {
    if (blocks == 0) return;
    if (shared > (int64_t{48} << 10)) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    kernel<<<static_cast<unsigned>(blocks), kInverseThreads, static_cast<size_t>(shared), stream>>>(batch,
                                                                                                    arguments...);
    check_launch(name);
  }
  void small(int32_t blocks) const {
    start("damped_inverse_small", small_kernel<T>, blocks, sweep_bytes(batch.problem[0].n));
  }
  void load(int32_t blocks) const { start("damped_inverse_load", load_kernel<T>, blocks, 0); }
  void pivots(int32_t blocks, int32_t step) const { start("damped_inverse_pivots", pivots_kernel<T>, blocks, 0, step); }
  void panel(int32_t blocks, int32_t step) const { start("damped_inverse_panel", panel_kernel<T>, blocks, 0, step); }
  void update(int32_t blocks, int32_t step) const { start("damped_inverse_update", update_kernel<T>, blocks, 0, step); }
  void finish(int32_t blocks) const { start("damped_inverse_finish", finish_kernel<T>, blocks, 0); }
  void poison(int32_t blocks) const { start("damped_inverse_poison", poison_kernel<T>, blocks, 0); }
};

template <class T>
void launch_part(InversePart part, InverseBatch& batch, Stream stream) {
  const Launches<T> go{batch, stream};
  const int32_t tiles = batch.layout(0, InverseBatch::tiles);
  switch (part) {
    case InversePart::load:
      return go.load(tiles);
    case InversePart::finish:
      return go.finish(tiles);
    case InversePart::poison:
      return go.poison(tiles);
  }
}

}  // namespace

void invert_batch(Element type, InverseBatch& batch, Stream stream) {
  static_assert(sizeof(InverseBatch) + sizeof(int32_t) <= 4096);
  type == Element::f64 ? inverse_launches(batch, Launches<double>{batch, stream})
                       : inverse_launches(batch, Launches<float>{batch, stream});
}

void invert_part(InversePart part, Element type, InverseBatch& batch, Stream stream) {
  type == Element::f64 ? launch_part<double>(part, batch, stream) : launch_part<float>(part, batch, stream);
}

}  // namespace kronfac::cuda
