#include "cuda/damped_eigh.cuh"

namespace kronfac::cuda {
namespace {

extern __shared__ double jacobi_memory[];

template <class T, int kClass>
__global__ void __launch_bounds__(kJacobiThreads[kClass], 1) small_kernel(const __grid_constant__ EighBatch batch) {
  DeviceBlock<NoState> block;
  small_eigh<T, kJacobiClasses[kClass], kJacobiThreads[kClass]>(block, jacobi_memory, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kEighThreads) measure_kernel(const __grid_constant__ EighBatch batch) {
  __shared__ EighShared shared;
  DeviceBlock<NoState> block;
  eigh_measure<T>(block, shared, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kEighThreads) copy_kernel(const __grid_constant__ EighBatch batch) {
  __shared__ EighTile<T> tile;
  DeviceBlock<NoState> block;
  eigh_copy<T>(block, tile, batch, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kEighThreads) results_kernel(const __grid_constant__ EighBatch batch) {
  __shared__ EighShared shared;
  DeviceBlock<NoState> block;
  eigh_results<T>(block, shared, batch, blockIdx.x);
}

template <class T>
struct Launches {
  const EighBatch& batch;
  Stream stream;

  void start(const char* name, void (*kernel)(EighBatch), int32_t blocks) const {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), kEighThreads, 0, stream>>>(batch);
    check_launch(name);
  }
  void measure(int32_t blocks) const { start("damped_eigh_measure", measure_kernel<T>, blocks); }
  void copy(int32_t blocks) const { start("damped_eigh_copy", copy_kernel<T>, blocks); }
  void results(int32_t blocks) const { start("damped_eigh_results", results_kernel<T>, blocks); }
};

template <class T, int kClass>
void small(const EighBatch& batch, Stream stream) {
  constexpr int kThreads = kJacobiThreads[kClass];
  int32_t n = 0;
  for (int32_t at = 0; at < batch.count; ++at) n = batch.problem[at].n > n ? batch.problem[at].n : n;
  const int64_t shared = jacobi_bytes(n, kThreads);
  if (shared > (int64_t{48} << 10)) {
    cudaFuncSetAttribute(small_kernel<T, kClass>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared));
  }
  small_kernel<T, kClass><<<static_cast<unsigned>(batch.count), kThreads, static_cast<size_t>(shared), stream>>>(batch);
  check_launch("damped_eigh_small");
}

template <class T>
void small_of(const EighBatch& batch, Stream stream) {
  const int which = jacobi_class(batch.problem[0].n);
  if (which == 0) small<T, 0>(batch, stream);
  if (which == 1) small<T, 1>(batch, stream);
  if (which == 2) small<T, 2>(batch, stream);
}

}  // namespace

int32_t eigh_small_order() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    check_launch("damped_eigh");
  }
  return small_order_of(bytes);
}

void eigh_small(Element type, EighBatch& batch, Stream stream) {
  static_assert(sizeof(EighBatch) <= 4096);
  if (batch.count == 0) return;
  type == Element::f64 ? small_of<double>(batch, stream) : small_of<float>(batch, stream);
}

void eigh_load(Element type, EighBatch& batch, Stream stream) {
  type == Element::f64 ? eigh_load_launches(batch, Launches<double>{batch, stream})
                       : eigh_load_launches(batch, Launches<float>{batch, stream});
}

void eigh_finish(Element type, EighBatch& batch, Stream stream) {
  type == Element::f64 ? eigh_finish_launches(batch, Launches<double>{batch, stream})
                       : eigh_finish_launches(batch, Launches<float>{batch, stream});
}

}  // namespace kronfac::cuda
