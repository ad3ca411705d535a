// The glue that both preconditioners share: layers in batches, the chain of products that each goes through.
#pragma once

#include <initializer_list>

#include "cuda/glue.h"
#include "cuda/precondition.h"

namespace kronfac::cuda {

// A matrix as a factor of a product.
struct View {
  const void* data;
  int64_t row, column;
  View transposed() const { return {data, column, row}; }
};
inline View view_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// Sets factors and result of a product; other is set by the caller.
inline void set_product(Product& p, const View& a, const View& b, int64_t m, int64_t k, int64_t n, void* c) {
  p.a = a.data, p.a_row = a.row, p.a_k = a.column;
  p.b = b.data, p.b_k = b.row, p.b_column = b.column;
  p.m = static_cast<int32_t>(m), p.n = static_cast<int32_t>(n), p.k = static_cast<int32_t>(k);
  p.c = c;
}

// Calls run(type, layers) for the layers of each gradient type, kMostLayers at a time.
template <class Run>
void each_batch(const std::vector<Tensor>& grads, const Run& run) {
  for (const ScalarType type : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<size_t> layers;
    for (size_t l = 0; l < grads.size(); ++l) {
      if (grads[l].scalar_type() != type) continue;
      layers.push_back(l);
      if (layers.size() < static_cast<size_t>(kMostLayers)) continue;
      run(layers);
      layers.clear();
    }
    if (!layers.empty()) run(layers);
  }
}

}  // namespace kronfac::cuda
