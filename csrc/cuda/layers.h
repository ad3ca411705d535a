// The glue that both preconditioners share: layers in batches, the chain of products that each goes through.
#pragma once

#include <initializer_list>

#include "cuda/glue.h"
#include "cuda/large_layers.h"

namespace kronfac::cuda {

inline View view_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// Sets factors and result of a product; other is set by the caller.
inline void set_product(Product& p, const View& a, const View& b, int64_t m, int64_t k, int64_t n, void* c) {
  p.a = a.data, p.a_row = a.row, p.a_k = a.column;
  p.b = b.data, p.b_k = b.row, p.b_column = b.column;
  p.m = static_cast<int32_t>(m), p.n = static_cast<int32_t>(n), p.k = static_cast<int32_t>(k);
  p.c = c;
}

// The products of a launch: set(p, l, rows, columns) for each layer. Returns the number of tiles.
template <class Set>
int32_t set_products(ProductBatch& batch, const std::vector<Tensor>& grads, const std::vector<size_t>& layers,
                     bool wide, const Set& set) {
  batch.count = 0;
  for (const size_t l : layers) {
    Product& p = batch.problem[batch.count++];
    p.index = static_cast<int32_t>(l);
    set(p, l, grads[l].size(0), grads[l].size(1));
  }
  return batch.layout(wide);
}

// Calls run(layers) for the layers of each gradient type that are wanted, kMostLayers at a time.
template <class Wanted, class Run>
void each_batch(const std::vector<Tensor>& grads, const Wanted& wanted, const Run& run) {
  for (const ScalarType type : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<size_t> layers;
    for (size_t l = 0; l < grads.size(); ++l) {
      if (grads[l].scalar_type() != type || !wanted(l)) continue;
      layers.push_back(l);
      if (layers.size() < static_cast<size_t>(kMostLayers)) continue;
      run(layers);
      layers.clear();
    }
    if (!layers.empty()) run(layers);
  }
}

// Whether layer l goes through cuBLAS.
inline bool large(const std::vector<Tensor>& grads, size_t l) {
  return large_layer(grads[l].size(0), grads[l].size(1)) && available();
}

// The launches of large_layers.h on the GPU, and the memory they work in.
class LargeLaunches {
 public:
  LargeLaunches(const Tensor& like, const Tensor& grad, bool wide, void* dots, Stream stream)
      : like_(like), grad_(element_of(grad)), wide_(wide), dots_(dots), stream_(stream) {}

  Element grad() const { return grad_; }
  bool wide() const { return wide_; }
  // Under TF32 each product by itself: kernels that use the chip's copy engine do not take lists of addresses.
  bool together() const { return wide_ || !tf32_allowed(); }
  void* memory(int64_t bytes) {
    memory_.push_back(empty_like(like_, {bytes}, ScalarType::Byte));
    return memory_.back().mutable_data_ptr();
  }
  void finish(const ProductBatch& batch, Finish finish, bool a_grad) const {
    cuda::finish(batch, finish, grad_, wide_, a_grad, stream_);
  }
  void addresses(const Addresses& addresses) const { store_addresses(addresses, stream_); }
  void products(const std::vector<Gemm>& gemms) const { run(gemms); }
  void dots(const ProductBatch& batch) const { product_dots(batch, wide_, dots_, stream_); }

 private:
  const Tensor& like_;
  Element grad_;
  bool wide_;
  void* dots_;
  Stream stream_;
  std::vector<Tensor> memory_;
};

}  // namespace kronfac::cuda
