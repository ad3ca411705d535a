#include "cuda/precondition.cuh"

namespace kronfac::cuda {
namespace {

template <Finish kFinish, class B, class Grad, class T>
__global__ void __launch_bounds__(kProductThreads, 2) product_kernel(const __grid_constant__ ProductBatch batch) {
  __shared__ ProductShared<T> shared;
  DeviceBlock<ProductState<T>> block;
  product_tile<kFinish, B, Grad, T>(block, shared, batch, blockIdx.x);
}

struct SumState {
  double sum;
};

template <Finish kFinish, class A, class Grad, class T>
__global__ void __launch_bounds__(kProductThreads) finish_kernel(const __grid_constant__ ProductBatch batch) {
  __shared__ double sums_of_warps[kProductThreads / 32];
  DeviceBlock<SumState> block;
  finish_tile<kFinish, A, Grad, T>(block, sums_of_warps, batch, blockIdx.x);
}

__global__ void __launch_bounds__(kMostAddresses) addresses_kernel(const __grid_constant__ Addresses addresses) {
  if (static_cast<int32_t>(threadIdx.x) < addresses.count) {
    addresses.target[threadIdx.x] = addresses.address[threadIdx.x];
  }
}

template <class T>
__global__ void __launch_bounds__(32) dot_kernel(const __grid_constant__ ProductBatch batch, T* dots) {
  DeviceBlock<DotState> block;
  product_dot<T>(block, batch, dots, blockIdx.x);
}

template <class Grad, class T>
void launch(const ProductBatch& batch, Finish finish, bool b_grad, Stream stream) {
  const auto start = [&](void (*kernel)(ProductBatch)) {
    kernel<<<static_cast<unsigned>(batch.first[batch.count]), kProductThreads, 0, stream>>>(batch);
    check_launch("product");
  };
  switch (finish) {
    case Finish::store:
      return start(b_grad ? product_kernel<Finish::store, Grad, T, T> : product_kernel<Finish::store, T, T, T>);
    case Finish::dot:
      return start(product_kernel<Finish::dot, T, Grad, T>);
    case Finish::divide:
      return start(product_kernel<Finish::divide, T, T, T>);
    case Finish::rounded:
      return start(product_kernel<Finish::rounded, T, Grad, T>);
  }
}

template <class Grad, class T>
void launch_finish(const ProductBatch& batch, Finish finish, bool a_grad, Stream stream) {
  const auto start = [&](void (*kernel)(ProductBatch)) {
    kernel<<<static_cast<unsigned>(batch.first[batch.count]), kProductThreads, 0, stream>>>(batch);
    check_launch("finish");
  };
  switch (finish) {
    case Finish::store:
      return start(a_grad ? finish_kernel<Finish::store, Grad, T, T> : finish_kernel<Finish::store, T, T, T>);
    case Finish::dot:
      return start(finish_kernel<Finish::dot, T, Grad, T>);
    case Finish::divide:
      return start(finish_kernel<Finish::divide, T, T, T>);
    case Finish::rounded:
      return start(finish_kernel<Finish::rounded, T, Grad, T>);
  }
}

}  // namespace

void finish(const ProductBatch& batch, Finish finish, Element grad, bool wide, bool a_grad, Stream stream) {
  if (batch.first[batch.count] == 0) return;
  if (wide) return launch_finish<double, double>(batch, finish, a_grad, stream);
  if (grad == Element::bf16) return launch_finish<BFloat16, float>(batch, finish, a_grad, stream);
  if (grad == Element::f16) return launch_finish<Half, float>(batch, finish, a_grad, stream);
  launch_finish<float, float>(batch, finish, a_grad, stream);
}

void store_addresses(const Addresses& addresses, Stream stream) {
  static_assert(sizeof(Addresses) <= 4096 && kMostAddresses <= 1024);
  if (addresses.count == 0) return;
  addresses_kernel<<<1, kMostAddresses, 0, stream>>>(addresses);
  check_launch("store_addresses");
}

void product(const ProductBatch& batch, Finish finish, Element grad, bool wide, bool b_grad, Stream stream) {
  static_assert(sizeof(ProductBatch) + sizeof(void*) <= 4096);
  if (batch.first[batch.count] == 0) return;
  if (wide) return launch<double, double>(batch, finish, b_grad, stream);
  if (grad == Element::bf16) return launch<BFloat16, float>(batch, finish, b_grad, stream);
  if (grad == Element::f16) return launch<Half, float>(batch, finish, b_grad, stream);
  launch<float, float>(batch, finish, b_grad, stream);
}

void product_dots(const ProductBatch& batch, bool wide, void* dots, Stream stream) {
  if (batch.count == 0) return;
  if (wide) {
    dot_kernel<double><<<static_cast<unsigned>(batch.count), 32, 0, stream>>>(batch, static_cast<double*>(dots));
  } else {
    dot_kernel<float><<<static_cast<unsigned>(batch.count), 32, 0, stream>>>(batch, static_cast<float*>(dots));
  }
  check_launch("product_dots");
}

}  // namespace kronfac::cuda
