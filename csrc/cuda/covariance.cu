#include "cuda/covariance.cuh"

namespace kronfac::cuda {
namespace {

// Sums, operands and addresses of a thread take about 150 registers in float32: one block on a multiprocessor, and no
// spills, which two would have.
template <class In, class T>
__global__ void __launch_bounds__(CovarianceTile<T>::Tile::kThreads, 1)
    covariance_kernel(const __grid_constant__ Covariance p) {
  __shared__ typename CovarianceTile<T>::Tile::Shared shared;
  DeviceBlock<CovarianceState<T>> block;
  covariance_tile<In, T>(block, shared, p, blockIdx.x, blockIdx.y);
}

template <class T>
__global__ void __launch_bounds__(256) covariance_finish(const __grid_constant__ Covariance p) {
  covariance_entry<T>(p, static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x);
}

template <class In, class T>
void launch(const Covariance& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(covariance_tiles(p)), static_cast<unsigned>(p.parts));
  covariance_kernel<In, T><<<grid, CovarianceTile<T>::Tile::kThreads, 0, stream>>>(p);
  check_launch("covariance");
  if (p.parts == 1) return;
  covariance_finish<T><<<static_cast<unsigned>((p.d() * p.d() + 255) / 256), 256, 0, stream>>>(p);
  check_launch("covariance_finish");
}

}  // namespace

void covariance(const Covariance& p, Stream stream) {
  if (p.d() == 0) return;
  switch (p.type) {
    case Element::f32:
      return launch<float, float>(p, stream);
    case Element::f64:
      return launch<double, double>(p, stream);
    case Element::bf16:
      return launch<BFloat16, float>(p, stream);
    case Element::f16:
      return launch<Half, float>(p, stream);
  }
}

}  // namespace kronfac::cuda
