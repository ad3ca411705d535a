#include "cuda/covariance.cuh"

namespace kronfac::cuda {
namespace {

// Sums, operands and addresses of a thread take about 150 registers in float32: one block on a multiprocessor, and no
// spills, which two would have.
template <class T>
__global__ void __launch_bounds__(kCovarianceThreads, 1) covariance_kernel(const __grid_constant__ Covariance p) {
  __shared__ typename CovarianceTile<T>::Tile::Shared shared;
  DeviceBlock<CovarianceState<T>> block;
  covariance_tile<T>(block, shared, p, blockIdx.x, blockIdx.y);
}

extern __shared__ float4 covariance_memory[];

// Two blocks on a multiprocessor: 136 KiB of shared memory, and registers enough for the 128 sums of a thread.
template <class In, bool kCopied>
__global__ void __launch_bounds__(MmaTile<In>::kThreads, 2)
    covariance_mma_kernel(const __grid_constant__ Covariance p) {
  DeviceBlock<CovarianceMmaState<In>> block;
  covariance_mma_tile<In, kCopied>(block, *reinterpret_cast<CovarianceMmaShared<In>*>(covariance_memory), p, blockIdx.x,
                                   blockIdx.y);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) covariance_parts_kernel(const __grid_constant__ Covariance p) {
  __shared__ SumShared<T> shared;
  DeviceBlock<SumState> block;
  covariance_sum_tile(block, shared, p, blockIdx.x,
                      [&](int64_t i, int64_t j) { return covariance_from_parts<T>(p, i, j); });
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    covariance_panels_kernel(const __grid_constant__ Covariance p, const __grid_constant__ CovariancePanels panels) {
  __shared__ SumShared<T> shared;
  DeviceBlock<SumState> block;
  covariance_sum_tile(block, shared, p, blockIdx.x,
                      [&](int64_t i, int64_t j) { return covariance_from_panels<T>(p, panels, i, j); });
}

template <class In, class T>
__global__ void __launch_bounds__(kSumThreads)
    covariance_column_sums_kernel(const __grid_constant__ Covariance p,
                                  const __grid_constant__ CovariancePanels panels) {
  __shared__ SumShared<T> shared;
  DeviceBlock<SumState> block;
  covariance_column_sums<In, T>(block, shared, p, panels, blockIdx.x, blockIdx.y);
}

dim3 grid_of(const Covariance& p) {
  return {static_cast<unsigned>(covariance_tiles(p)), static_cast<unsigned>(p.parts)};
}

unsigned sum_tiles(const Covariance& p) {
  const int64_t across = (p.d() + kSumSide - 1) / kSumSide;
  return static_cast<unsigned>(across * (across + 1) / 2);
}

template <class T>
void add_parts(const Covariance& p, Stream stream) {
  if (p.parts == 1) return;
  covariance_parts_kernel<T><<<sum_tiles(p), kSumThreads, 0, stream>>>(p);
  check_launch("covariance_parts");
}

template <class T>
void launch(const Covariance& p, Stream stream) {
  covariance_kernel<T><<<grid_of(p), kCovarianceThreads, 0, stream>>>(p);
  check_launch("covariance");
  add_parts<T>(p, stream);
}

template <class In>
void launch_mma(const Covariance& p, Stream stream) {
  const auto kernel =
      MmaTile<In>::copyable(p.x, p.row, p.feature) ? covariance_mma_kernel<In, true> : covariance_mma_kernel<In, false>;
  constexpr int kShared = sizeof(CovarianceMmaShared<In>);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  kernel<<<grid_of(p), MmaTile<In>::kThreads, kShared, stream>>>(p);
  check_launch("covariance_mma");
  add_parts<float>(p, stream);
}

template <class In, class T>
void finish(const Covariance& p, const CovariancePanels& panels, Stream stream) {
  if (panels.sum_parts > 0) {
    const dim3 grid(static_cast<unsigned>((p.features + kSumSide - 1) / kSumSide),
                    static_cast<unsigned>(panels.sum_parts));
    covariance_column_sums_kernel<In, T><<<grid, kSumThreads, 0, stream>>>(p, panels);
    check_launch("covariance_column_sums");
  }
  covariance_panels_kernel<T><<<sum_tiles(p), kSumThreads, 0, stream>>>(p, panels);
  check_launch("covariance_panels");
}

}  // namespace

void covariance(const Covariance& p, Stream stream) {
  if (p.d() == 0) return;
  switch (p.type) {
    case Element::f32:
      return p.tensor_cores ? launch_mma<float>(p, stream) : launch<float>(p, stream);
    case Element::f64:
      return launch<double>(p, stream);
    case Element::bf16:
      return launch_mma<BFloat16>(p, stream);
    case Element::f16:
      return launch_mma<Half>(p, stream);
  }
}

void covariance_finish(const Covariance& p, const CovariancePanels& panels, Stream stream) {
  static_assert(sizeof(Covariance) + sizeof(CovariancePanels) <= 4096);
  switch (p.type) {
    case Element::f32:
      return finish<float, float>(p, panels, stream);
    case Element::f64:
      return finish<double, double>(p, panels, stream);
    case Element::bf16:
      return finish<BFloat16, float>(p, panels, stream);
    case Element::f16:
      return finish<Half, float>(p, panels, stream);
  }
}

}  // namespace kronfac::cuda
