#include "cuda/conv_covariance_mma.cuh"

namespace kronfac::cuda {
namespace {

extern __shared__ float4 conv_memory[];

// Four blocks of small tiles on a multiprocessor (160 KiB of shared memory; three in TF32, whose fragments take more
// registers), two of large ones (148 KiB).
template <class In, int kSide, bool kAligned>
__global__ void __launch_bounds__(MmaTile<In, kSide>::kThreads, kSide == 128      ? 2
                                                                : sizeof(In) == 2 ? 4
                                                                                  : 3)
    mma_product_kernel(const __grid_constant__ ConvCovariance p) {
  DeviceBlock<ConvMmaState<In, kSide>> block;
  conv_mma_product<In, kSide, kAligned>(block, *reinterpret_cast<ConvMmaShared<In, kSide>*>(conv_memory), p,
                                        static_cast<int32_t>(blockIdx.x));
}

template <class In, int kSide>
void launch(const ConvCovariance& p, Stream stream) {
  constexpr int kShared = sizeof(ConvMmaShared<In, kSide>);
  const auto kernel = p.aligned ? mma_product_kernel<In, kSide, true> : mma_product_kernel<In, kSide, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  kernel<<<static_cast<unsigned>(p.groups * p.blocks), MmaTile<In, kSide>::kThreads, kShared, stream>>>(p);
  check_launch("conv_covariance_mma");
}

template <class In>
void launch(const ConvCovariance& p, Stream stream) {
  p.side == 64 ? launch<In, 64>(p, stream) : launch<In, 128>(p, stream);
}

}  // namespace

void conv_mma_products(const ConvCovariance& p, Stream stream) {
  switch (p.type) {
    case Element::bf16:
      return launch<BFloat16>(p, stream);
    case Element::f16:
      return launch<Half>(p, stream);
    default:
      return launch<float>(p, stream);
  }
}

}  // namespace kronfac::cuda
