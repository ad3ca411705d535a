#include "cuda/precondition.cuh"

namespace kronfac::cuda {
namespace {

template <Finish kFinish, class B, class Grad, class T>
__global__ void __launch_bounds__(kProductThreads, 2) product_kernel(const __grid_constant__ ProductBatch batch) {
  __shared__ ProductShared<T> shared;
  DeviceBlock<ProductState<T>> block;
  product_tile<kFinish, B, Grad, T>(block, shared, batch, blockIdx.x);
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

}  // namespace

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
