#include "cuda/orthogonalize.cuh"

namespace kronfac::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kOrthogonalizeThreads, 4)
    sweep_kernel(const __grid_constant__ Orthogonalize p, bool subtract, bool project) {
  __shared__ OrthogonalizeShared<T> shared;
  DeviceBlock<OrthogonalizeState> block;
  orthogonalize_sweep<T>(block, shared, p, blockIdx.x, subtract, project);
}

template <class T>
__global__ void __launch_bounds__(32) coefficient_kernel(const __grid_constant__ Orthogonalize p, bool first) {
  DeviceBlock<OrthogonalizeState> block;
  orthogonalize_coefficient<T>(block, p, blockIdx.x, first);
}

template <class T>
void launch(const Orthogonalize& p, Stream stream) {
  for (int64_t sweep = 0; sweep <= p.passes; ++sweep) {
    sweep_kernel<T>
        <<<static_cast<unsigned>(p.blocks), kOrthogonalizeThreads, 0, stream>>>(p, sweep > 0, sweep < p.passes);
    check_launch("orthogonalize_sweep");
    if (sweep == p.passes) break;
    coefficient_kernel<T><<<static_cast<unsigned>(p.m), 32, 0, stream>>>(p, sweep == 0);
    check_launch("orthogonalize_coefficient");
  }
}

}  // namespace

void orthogonalize(const Orthogonalize& p, Stream stream) {
  p.type == Element::f64 ? launch<double>(p, stream) : launch<float>(p, stream);
}

}  // namespace kronfac::cuda
