#include "cuda/second_moment.cuh"

namespace kronfac::cuda {
namespace {

template <class In, class T, bool kSingle>
__global__ void __launch_bounds__(SecondMomentTile<T>::Tile::kThreads, 2)
    second_moment_kernel(const __grid_constant__ SecondMoment p) {
  __shared__ typename SecondMomentTile<T>::Tile::Shared shared;
  DeviceBlock<SecondMomentState<T>> block;
  second_moment_tile<In, T, kSingle>(block, shared, p, blockIdx.y, blockIdx.x, blockIdx.z);
}

template <class T>
__global__ void __launch_bounds__(256) second_moment_finish(const __grid_constant__ SecondMoment p) {
  second_moment_entry<T>(p, static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x);
}

template <class In, class T>
void launch(const SecondMoment& p, Stream stream) {
  using Tile = typename SecondMomentTile<T>::Tile;
  const int64_t across = (p.columns() + Tile::kColumns - 1) / Tile::kColumns,
                down = (p.outputs + Tile::kRows - 1) / Tile::kRows;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(p.parts));
  const auto kernel = p.positions == 1 ? second_moment_kernel<In, T, true> : second_moment_kernel<In, T, false>;
  kernel<<<grid, Tile::kThreads, 0, stream>>>(p);
  check_launch("second_moment");
  if (p.parts == 1) return;
  const int64_t blocks = (p.outputs * p.columns() + 255) / 256;
  second_moment_finish<T><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(p);
  check_launch("second_moment_finish");
}

}  // namespace

void second_moment(const SecondMoment& p, Stream stream) {
  if (p.outputs == 0 || p.columns() == 0) return;
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
