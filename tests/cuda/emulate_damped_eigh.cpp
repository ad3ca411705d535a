// The kernels of damped_eigh, run thread by thread on the CPU (see emulate.cpp).
#include <memory>
#include <vector>

#include "cuda/damped_eigh.cuh"

using namespace kronfac::cuda;

namespace {

// Blocks of a launch in either direction: their order must not matter.
template <class F>
void each(int32_t blocks, const F& f) {
  for (int32_t i = blocks; i > 0; --i) f(i - 1);
}

template <class T, int kClass>
void small(const EighBatch& batch) {
  constexpr int kOrder = kJacobiClasses[kClass], kThreads = kJacobiThreads[kClass];
  const auto block = std::make_unique<HostBlock<NoState, kThreads>>();
  std::vector<double> memory(static_cast<size_t>(jacobi_bytes(kOrder, kThreads)) / sizeof(double));
  each(batch.count, [&](int32_t i) { small_eigh<T, kOrder, kThreads>(*block, memory.data(), batch, i); });
}

template <class T>
void small_of(const EighBatch& batch) {
  const int which = jacobi_class(batch.problem[0].n);
  if (which == 0) small<T, 0>(batch);
  if (which == 1) small<T, 1>(batch);
  if (which == 2) small<T, 2>(batch);
}

template <class T>
struct EmulatedLaunches {
  const EighBatch& batch;
  HostBlock<NoState, kEighThreads>& block;

  void measure(int32_t blocks) const {
    EighShared shared;
    each(blocks, [&](int32_t i) { eigh_measure<T>(block, shared, batch, i); });
  }
  void copy(int32_t blocks) const {
    EighTile<T> tile;
    each(blocks, [&](int32_t i) { eigh_copy<T>(block, tile, batch, i); });
  }
  void results(int32_t blocks) const {
    EighShared shared;
    each(blocks, [&](int32_t i) { eigh_results<T>(block, shared, batch, i); });
  }
};

template <class T>
void run(EighBatch& batch, int step) {
  HostBlock<NoState, kEighThreads> block;
  const EmulatedLaunches<T> launches{batch, block};
  if (step == 0) small_of<T>(batch);
  if (step == 1) eigh_load_launches(batch, launches);
  if (step == 2) eigh_finish_launches(batch, launches);
}

}  // namespace

extern "C" int32_t small_order(int64_t bytes) { return small_order_of(bytes); }
extern "C" int64_t jacobi_shared_memory(int32_t n) { return jacobi_bytes(n, kJacobiThreads[jacobi_class(n)]); }

// One batch. step: 0 all of small matrices, 1 what comes before a library, 2 what comes after it. pointers: f, values,
// vectors, a, w, failed of each; strides: 2 of each f.
extern "C" void emulate_damped_eigh(int type, int step, int32_t count, void* const* pointers, const int64_t* strides,
                                    const int64_t* n, const void* damping, int64_t damping_stride, int32_t* info,
                                    int32_t* exponent) {
  EighBatch batch{};
  batch.damping = damping, batch.damping_stride = damping_stride, batch.info = info, batch.exponent = exponent;
  for (int32_t i = 0; i < count; ++i) {
    void* const* const p = pointers + 6 * i;
    batch.problem[batch.count++] = {p[0],
                                    strides[2 * i],
                                    strides[2 * i + 1],
                                    p[1],
                                    p[2],
                                    p[3],
                                    p[4],
                                    static_cast<const int32_t*>(p[5]),
                                    int32_t(n[i]),
                                    i};
  }
  static_cast<Element>(type) == Element::f64 ? run<double>(batch, step) : run<float>(batch, step);
}
