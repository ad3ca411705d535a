// csrc/cuda/blocked_inverse.h on the CPU: kernels thread by thread, products by loops.
#include <deque>
#include <memory>

#include "cuda/blocked_inverse.cuh"
#include "naive_gemm.h"

using namespace kronfac::cuda;

namespace {

// Blocks of a launch backwards: their order must not matter.
template <class F>
void each(int32_t blocks, const F& f) {
  for (int32_t i = blocks; i > 0; --i) f(i - 1);
}

template <class T>
struct EmulatedLaunches {
  std::deque<std::vector<unsigned char>> all{};
  HostBlock<NoState, kInverseThreads> plain{};
  std::unique_ptr<HostBlock<FactorState, kFactorThreads>> factoring{new HostBlock<FactorState, kFactorThreads>};
  FactorShared shared{};
  int64_t calls = 0;

  void* memory(int64_t bytes) {
    return all.emplace_back(static_cast<size_t>(bytes), static_cast<unsigned char>(0xff)).data();  // NaN
  }
  void load(InverseBatch& batch) {
    each(batch.layout(0, InverseBatch::tiles), [&](int32_t i) { inverse_load<T>(plain, batch, i); });
  }
  void finish(InverseBatch& batch) {
    each(batch.layout(0, InverseBatch::tiles), [&](int32_t i) { inverse_finish<T>(plain, batch, i); });
  }
  void poison(InverseBatch& batch) {
    each(batch.layout(0, InverseBatch::tiles), [&](int32_t i) { inverse_poison<T>(plain, batch, i); });
  }
  void factor(BlockedBatch& batch) {
    each(batch.layout(batch.part_start(), [](int32_t) { return int32_t{1}; }),
         [&](int32_t i) { factor_block<T>(*factoring, shared, batch, i); });
  }
  void gather(BlockedBatch& batch) {
    each(batch.layout(batch.start(), [&](int32_t n) { return batch.gathers(n); }),
         [&](int32_t i) { gather_block<T>(plain, batch, i); });
  }
  void addresses(BlockedBatch& batch) {
    each(batch.layout(0, [](int32_t) { return int32_t{1}; }), [&](int32_t i) { addresses_of<T>(plain, batch, i); });
  }
  void products(const std::vector<Gemm>& gemms) {
    for (const Gemm& g : gemms) {
      if (g.m == 0) continue;
      ++calls;
      execute(g);
    }
  }
};

template <class T>
int64_t invert(InverseBatch& batch, int32_t block, int32_t tile, Element type) {
  EmulatedLaunches<T> launches;
  blocked_inverse(batch, block, tile, type, launches);
  return launches.calls;
}

}  // namespace

// One batch, orders n[i] descending; strides: 2 of each f. Returns the number of products' calls.
extern "C" int64_t emulate_blocked_inverse(int type, int32_t block, int32_t tile, int32_t count, const void* const* f,
                                           const int64_t* strides, const int64_t* n, void* const* x,
                                           const void* damping, int64_t damping_stride, int32_t* info) {
  InverseBatch batch{};
  batch.damping = damping, batch.damping_stride = damping_stride, batch.info = info;
  for (int32_t i = 0; i < count; ++i) {
    batch.problem[batch.count++] = {f[i], strides[2 * i], strides[2 * i + 1], x[i], nullptr, int32_t(n[i]), i};
  }
  const Element element = static_cast<Element>(type);
  return element == Element::f64 ? invert<double>(batch, block, tile, element)
                                 : invert<float>(batch, block, tile, element);
}
