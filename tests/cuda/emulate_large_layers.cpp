// The chains of csrc/cuda/large_layers.h on the CPU: the kernels before and after the products thread by thread, the
// products by loops.
#include <cmath>
#include <cstring>
#include <deque>

#include "cuda/large_layers.h"
#include "cuda/precondition.cuh"
#include "naive_gemm.h"

using namespace kronfac::cuda;

namespace {

struct SumState {
  double sum;
};

template <Finish kFinish, class A, class Grad, class T>
void finish_blocks(const ProductBatch& batch) {
  HostBlock<SumState, kProductThreads> block;
  double sums_of_warps[kProductThreads / 32];
  for (int32_t i = batch.first[batch.count]; i > 0; --i) {
    finish_tile<kFinish, A, Grad, T>(block, sums_of_warps, batch, i - 1);
  }
}

template <class Grad, class T>
void finish_of(const ProductBatch& batch, Finish finish, bool a_grad) {
  if (finish == Finish::store && a_grad) finish_blocks<Finish::store, Grad, T, T>(batch);
  if (finish == Finish::store && !a_grad) finish_blocks<Finish::store, T, T, T>(batch);
  if (finish == Finish::dot) finish_blocks<Finish::dot, T, Grad, T>(batch);
  if (finish == Finish::divide) finish_blocks<Finish::divide, T, T, T>(batch);
  if (finish == Finish::rounded) finish_blocks<Finish::rounded, T, Grad, T>(batch);
}

struct EmulatedLaunches {
  Element type;
  bool is_wide, is_together;
  void* results;
  std::deque<std::vector<unsigned char>> all{};
  int64_t batches = 0, singles = 0, copies = 0;

  Element grad() const { return type; }
  bool wide() const { return is_wide; }
  bool together() const { return is_together; }
  void* memory(int64_t bytes) {
    return all.emplace_back(static_cast<size_t>(bytes), static_cast<unsigned char>(0xff)).data();
  }
  void finish(const ProductBatch& batch, Finish finish, bool a_grad) {
    if (finish == Finish::store) copies += batch.count;
    if (is_wide) return finish_of<double, double>(batch, finish, a_grad);
    if (type == Element::bf16) return finish_of<BFloat16, float>(batch, finish, a_grad);
    if (type == Element::f16) return finish_of<Half, float>(batch, finish, a_grad);
    finish_of<float, float>(batch, finish, a_grad);
  }
  void addresses(const Addresses& list) {
    for (int32_t i = 0; i < list.count; ++i) list.target[i] = list.address[i];
  }
  void products(const std::vector<Gemm>& gemms) {
    for (const Gemm& g : gemms) {
      execute(g);
      ++(g.pointers ? batches : singles);
    }
  }
  void dots(const ProductBatch& batch) {
    HostBlock<DotState, 32> warp;
    for (int32_t i = 0; i < batch.count; ++i) {
      is_wide ? product_dot(warp, batch, static_cast<double*>(results), i)
              : product_dot(warp, batch, static_cast<float*>(results), i);
    }
  }
};

}  // namespace

extern "C" bool large_layer_of(int64_t rows, int64_t columns) { return large_layer(rows, columns); }

// pointers: grad, left, right, eigenvalues (or null for kron_precondition), out of each layer; strides: 2 of the first
// four each; sizes: rows, columns. counts: products in batches, by themselves, copies.
extern "C" void emulate_large_layers(int grad, bool wide, bool together, int64_t count, void* const* pointers,
                                     const int64_t* strides, const int64_t* sizes, const void* damping,
                                     int64_t damping_stride, void* dots, int64_t* counts) {
  std::vector<LargeLayer> layers;
  for (int64_t i = 0; i < count; ++i) {
    const auto view = [&](int64_t which) {
      return View{pointers[5 * i + which], strides[8 * i + 2 * which], strides[8 * i + 2 * which + 1]};
    };
    layers.push_back({view(0), view(1), view(2), view(3), pointers[5 * i + 4], sizes[2 * i], sizes[2 * i + 1],
                      static_cast<int32_t>(i)});
  }
  EmulatedLaunches launches{static_cast<Element>(grad), wide, together, dots};
  LargeChain chain(layers, launches);
  damping == nullptr ? chain.kron() : chain.eigen(damping, damping_stride);
  counts[0] = launches.batches, counts[1] = launches.singles, counts[2] = launches.copies;
}
