#include "cuda/conv_covariance_assemble.cuh"
#include "cuda/conv_covariance_layout.cuh"

namespace kronfac::cuda {
namespace {

// Twelve warps on a multiprocessor, in float64 eight: with sixteen a few registers would spill.
template <class T, int kSide, bool kAligned>
__global__ void __launch_bounds__(ConvTile<T, kSide>::Tile::kThreads, 384 / ConvTile<T, kSide>::Tile::kThreads)
    product_kernel(const __grid_constant__ ConvCovariance p) {
  __shared__ ConvShared<T, kSide> shared;
  DeviceBlock<ConvState<T, kSide>> block;
  conv_product<T, kSide, kAligned>(block, shared, p, static_cast<int32_t>(blockIdx.x));
}

template <class T>
__global__ void __launch_bounds__(kConvThreads) reduce_kernel(const __grid_constant__ ConvCovariance p) {
  conv_reduce<T>(p, static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kConvThreads) assemble_kernel(const __grid_constant__ ConvCovariance p) {
  __shared__ ConvAssembleShared<T> shared;
  DeviceBlock<NoState> block;
  conv_assemble<T>(block, shared, p, static_cast<int32_t>(blockIdx.x));
}

template <class T>
__global__ void __launch_bounds__(kConvThreads) bias_kernel(const __grid_constant__ ConvCovariance p) {
  conv_bias<T>(p, static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kConvThreads) upload_kernel(const __grid_constant__ ConvUpload p) {
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += kConvThreads) p.target[i] = p.word[i];
}

template <class E>
__global__ void __launch_bounds__(kConvThreads) transpose_kernel(const __grid_constant__ ConvLayout p) {
  __shared__ ConvTransposeShared<E> shared;
  DeviceBlock<NoState> block;
  conv_transpose_block<E>(block, shared, p, static_cast<int32_t>(blockIdx.x));
}

template <class E>
__global__ void __launch_bounds__(kConvThreads) pad_kernel(const __grid_constant__ ConvLayout p) {
  conv_pad_entry<E>(p, static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x);
}

unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

template <class T, int kSide>
void launch_products(const ConvCovariance& p, Stream stream) {
  const auto kernel = p.aligned ? product_kernel<T, kSide, true> : product_kernel<T, kSide, false>;
  kernel<<<grid(p.groups * p.blocks), ConvTile<T, kSide>::Tile::kThreads, 0, stream>>>(p);
  check_launch("conv_covariance");
}

template <class T>
void launch_products(const ConvCovariance& p, Stream stream) {
  p.side == 32 ? launch_products<T, 32>(p, stream) : launch_products<T, 64>(p, stream);
}

template <class T>
void launch(const ConvCovariance& p, Stream stream) {
  if (p.blocks > 0) p.tensor ? conv_mma_products(p, stream) : launch_products<T>(p, stream);
  if (p.reduced) {
    reduce_kernel<T><<<grid(conv_reduce_blocks(p)), kConvThreads, 0, stream>>>(p);
    check_launch("conv_covariance_reduce");
  }
  if (p.rows > 0) {
    assemble_kernel<T><<<grid(conv_assemble_blocks(p)), kConvThreads, 0, stream>>>(p);
    check_launch("conv_covariance_assemble");
  }
  if (p.bias) {
    bias_kernel<T><<<grid(conv_bias_blocks(p)), kConvThreads, 0, stream>>>(p);
    check_launch("conv_covariance_bias");
  }
}

template <class E>
void transpose(const ConvLayout& p, Stream stream) {
  transpose_kernel<E><<<grid(conv_transpose_blocks(p)), kConvThreads, 0, stream>>>(p);
  check_launch("conv_covariance_transpose");
}
template <class E>
void pad(const ConvLayout& p, Stream stream) {
  pad_kernel<E><<<grid(conv_pad_blocks(p)), kConvThreads, 0, stream>>>(p);
  check_launch("conv_covariance_pad");
}

}  // namespace

void conv_upload(const ConvUpload& p, Stream stream) {
  upload_kernel<<<1, kConvThreads, 0, stream>>>(p);
  check_launch("conv_covariance_upload");
}

void conv_transpose(const ConvLayout& p, int64_t bytes, Stream stream) {
  if (bytes == 2) return transpose<uint16_t>(p, stream);
  if (bytes == 4) return transpose<uint32_t>(p, stream);
  transpose<uint64_t>(p, stream);
}

void conv_pad(const ConvLayout& p, int64_t bytes, Stream stream) {
  if (bytes == 2) return pad<uint16_t>(p, stream);
  if (bytes == 4) return pad<uint32_t>(p, stream);
  pad<uint64_t>(p, stream);
}

void conv_covariance(const ConvCovariance& p, Stream stream) {
  if (p.groups == 0 || p.d() == 0) return;
  p.type == Element::f64 ? launch<double>(p, stream) : launch<float>(p, stream);
}

}  // namespace kronfac::cuda
