// The kernel templates of csrc/cuda, run thread by thread on the CPU: the source that nvcc compiles, with plain loops
// in place of the launches. Element types are numbered as in cuda/launch.h.
#include "emulation.h"

#include <memory>
#include <vector>

#include "cuda/damped_inverse.cuh"
#include "cuda/orthogonalize.cuh"
#include "cuda/precondition.cuh"
#include "cuda/second_moment.cuh"

using namespace kronfac::cuda;

namespace {

int64_t bytes_of_sums(Element type) { return type == Element::f64 ? 8 : 4; }

template <class In, class T, bool kSingle>
void second_moment_blocks(const SecondMoment& p) {
  using Tile = typename SecondMomentTile<T>::Tile;
  const auto shared = std::make_unique<typename Tile::Shared>();
  const auto block = std::make_unique<HostBlock<SecondMomentState<T>, Tile::kThreads>>();
  for (int64_t row = 0; row * Tile::kRows < p.outputs; ++row) {
    for (int64_t column = 0; column * Tile::kColumns < p.columns(); ++column) {
      for (int64_t part = 0; part < p.parts; ++part) {
        second_moment_tile<In, T, kSingle>(fresh(*block), fresh(*shared), p, row, column, part);
      }
    }
  }
  if (p.parts == 1) return;
  for (int64_t i = 0; i < (p.outputs * p.columns() + 255) / 256 * 256; ++i) second_moment_entry<T>(p, i);
}

template <class In, class T>
void second_moment_of(const SecondMoment& p) {
  p.positions == 1 ? second_moment_blocks<In, T, true>(p) : second_moment_blocks<In, T, false>(p);
}

template <class T>
void orthogonalize_of(const Orthogonalize& p) {
  HostBlock<OrthogonalizeState, kOrthogonalizeThreads> block;
  HostBlock<OrthogonalizeState, 32> warp;
  OrthogonalizeShared<T> shared;
  for (int64_t sweep = 0; sweep <= p.passes; ++sweep) {
    for (int64_t i = 0; i < p.blocks; ++i) {
      orthogonalize_sweep<T>(fresh(block), fresh(shared), p, i, sweep > 0, sweep < p.passes);
    }
    if (sweep == p.passes) return;
    for (int64_t i = 0; i < p.m; ++i) orthogonalize_coefficient<T>(fresh(warp), p, i, sweep == 0);
  }
}

template <class T>
struct EmulatedLaunches {
  const InverseBatch& batch;
  HostBlock<NoState, kInverseThreads>& plain;
  HostBlock<InverseState<T>, kInverseThreads>& tiled;
  typename InverseTile<T>::Shared& shared;

  // Blocks of a launch in either direction: their order must not matter.
  template <class F>
  static void each(int32_t blocks, const F& f) {
    for (int32_t i = blocks; i > 0; --i) f(i - 1);
  }
  void small(int32_t blocks) const {
    LaunchMemory shared_memory(sweep_bytes(batch.problem[0].n));
    each(blocks, [&](int32_t i) { small_inverse<T>(fresh(plain), shared_memory.fresh<double>(), batch, i); });
  }
  void load(int32_t blocks) const {
    each(blocks, [&](int32_t i) { inverse_load<T>(fresh(plain), batch, i); });
  }
  void pivots(int32_t blocks, int32_t step) const {
    HostBlock<FactorState, kFactorThreads> factoring;
    FactorShared line;
    each(blocks, [&](int32_t i) { inverse_pivots<T>(fresh(factoring), fresh(line), batch, i, step); });
  }
  void panel(int32_t blocks, int32_t step) const {
    each(blocks, [&](int32_t i) { inverse_panel<T>(fresh(tiled), fresh(shared), batch, i, step); });
  }
  void update(int32_t blocks, int32_t step) const {
    each(blocks, [&](int32_t i) { inverse_update<T>(fresh(tiled), fresh(shared), batch, i, step); });
  }
  void finish(int32_t blocks) const {
    each(blocks, [&](int32_t i) { inverse_finish<T>(fresh(plain), batch, i); });
  }
  void poison(int32_t blocks) const {
    each(blocks, [&](int32_t i) { inverse_poison<T>(fresh(plain), batch, i); });
  }
};

template <class T>
void damped_inverse_of(InverseBatch& batch) {
  HostBlock<NoState, kInverseThreads> plain;
  const auto tiled = std::make_unique<HostBlock<InverseState<T>, kInverseThreads>>();
  const auto shared = std::make_unique<typename InverseTile<T>::Shared>();
  inverse_launches(batch, EmulatedLaunches<T>{batch, plain, *tiled, *shared});
}

template <Finish kFinish, class B, class Grad, class T>
void product_blocks(const ProductBatch& batch) {
  const auto block = std::make_unique<HostBlock<ProductState<T>, kProductThreads>>();
  const auto shared = std::make_unique<ProductShared<T>>();
  for (int32_t i = batch.first[batch.count]; i > 0; --i) {
    product_tile<kFinish, B, Grad, T>(fresh(*block), fresh(*shared), batch, i - 1);
  }
}

template <class Grad, class T>
void product_of(const ProductBatch& batch, Finish finish, bool b_grad) {
  if (finish == Finish::store && b_grad) product_blocks<Finish::store, Grad, T, T>(batch);
  if (finish == Finish::store && !b_grad) product_blocks<Finish::store, T, T, T>(batch);
  if (finish == Finish::dot) product_blocks<Finish::dot, T, Grad, T>(batch);
  if (finish == Finish::divide) product_blocks<Finish::divide, T, T, T>(batch);
  if (finish == Finish::rounded) product_blocks<Finish::rounded, T, Grad, T>(batch);
}

}  // namespace

// sizes: examples, positions, outputs, inputs; strides: 3 of g, 3 of x, 2 of out. Returns the parts it was cut into.
extern "C" int64_t emulate_second_moment(int type, const void* g, const void* x, void* out, const int64_t* sizes,
                                         const int64_t* strides, bool bias, double decay, double scale) {
  SecondMoment p{};
  p.type = static_cast<Element>(type), p.g = g, p.x = x, p.out = out;
  p.examples = sizes[0], p.positions = sizes[1], p.outputs = sizes[2], p.inputs = sizes[3];
  p.g_example = strides[0], p.g_position = strides[1], p.g_feature = strides[2];
  p.x_example = strides[3], p.x_position = strides[4], p.x_feature = strides[5];
  p.out_row = strides[6], p.out_column = strides[7];
  p.bias = bias, p.decay = decay, p.scale = scale;
  p.parts = second_moment_parts(p);
  LaunchMemory partial(p.parts > 1 ? p.parts * p.outputs * p.columns() * bytes_of_sums(p.type) : 0);
  p.partial = partial.fresh<void>();
  if (p.type == Element::f32) second_moment_of<float, float>(p);
  if (p.type == Element::f64) second_moment_of<double, double>(p);
  if (p.type == Element::bf16) second_moment_of<BFloat16, float>(p);
  if (p.type == Element::f16) second_moment_of<Half, float>(p);
  return p.parts;
}

// sizes: m, n, passes; strides: of w, 2 of v. Returns the number of blocks of columns.
extern "C" int64_t emulate_orthogonalize(int type, void* w, const void* v, void* coefficients, const int64_t* sizes,
                                         const int64_t* strides) {
  Orthogonalize p{};
  p.type = static_cast<Element>(type), p.w = w, p.v = v, p.coefficients = coefficients;
  p.m = sizes[0], p.n = sizes[1], p.passes = sizes[2];
  p.w_stride = strides[0], p.row_stride = strides[1], p.column_stride = strides[2];
  p.width = orthogonalize_width(p.m, p.type == Element::f64 ? 8 : 4);
  p.blocks = (p.n + p.width - 1) / p.width;
  LaunchMemory memory(p.m * (p.blocks + 2) * int64_t{sizeof(double)});
  p.latest = memory.fresh<double>(), p.total = p.latest + p.m, p.partial = p.total + p.m;
  p.type == Element::f64 ? orthogonalize_of<double>(p) : orthogonalize_of<float>(p);
  return p.blocks;
}

// One batch, all orders n[i] above kSmallOrder or none, descending; strides: 2 of each f.
extern "C" void emulate_damped_inverse(int type, int32_t count, const void* const* f, const int64_t* strides,
                                       const int64_t* n, void* const* x, const void* damping, int64_t damping_stride,
                                       int32_t* info) {
  InverseBatch batch{};
  batch.damping = damping, batch.damping_stride = damping_stride, batch.info = info;
  std::vector<LaunchMemory> memory;
  for (int32_t i = 0; i < count; ++i) {
    memory.emplace_back(inverse_work(n[i]) * bytes_of_sums(static_cast<Element>(type)));
    batch.problem[batch.count++] = {
        f[i], strides[2 * i], strides[2 * i + 1], x[i], memory.back().fresh<void>(), int32_t(n[i]), i};
  }
  static_cast<Element>(type) == Element::f64 ? damped_inverse_of<double>(batch) : damped_inverse_of<float>(batch);
}

// One launch over `count` layers, and the sums of it. pointers: a, b, c, other of each; strides: 2 of a, b, other of
// each; sizes: m, n, k of each.
extern "C" void emulate_product(int grad, bool wide, int finish, bool b_grad, int32_t count, void* const* pointers,
                                const int64_t* strides, const int64_t* sizes, const void* damping,
                                int64_t damping_stride, void* dots) {
  ProductBatch batch{};
  batch.damping = damping, batch.damping_stride = damping_stride;
  for (int32_t i = 0; i < count; ++i) {
    Product& p = batch.problem[batch.count++];
    p.a = pointers[4 * i], p.b = pointers[4 * i + 1], p.c = pointers[4 * i + 2], p.other = pointers[4 * i + 3];
    p.a_row = strides[6 * i], p.a_k = strides[6 * i + 1], p.b_k = strides[6 * i + 2], p.b_column = strides[6 * i + 3];
    p.other_row = strides[6 * i + 4], p.other_column = strides[6 * i + 5];
    p.m = int32_t(sizes[3 * i]), p.n = int32_t(sizes[3 * i + 1]), p.k = int32_t(sizes[3 * i + 2]), p.index = i;
  }
  LaunchMemory partial(batch.layout(wide) * int64_t{sizeof(double)});
  batch.partial = partial.fresh<double>();
  const Finish how = static_cast<Finish>(finish);
  if (wide) {
    product_of<double, double>(batch, how, b_grad);
  } else if (static_cast<Element>(grad) == Element::bf16) {
    product_of<BFloat16, float>(batch, how, b_grad);
  } else if (static_cast<Element>(grad) == Element::f16) {
    product_of<Half, float>(batch, how, b_grad);
  } else {
    product_of<float, float>(batch, how, b_grad);
  }
  if (how != Finish::dot && how != Finish::divide) return;
  HostBlock<DotState, 32> warp;
  for (int32_t i = 0; i < count; ++i) {
    wide ? product_dot(fresh(warp), batch, static_cast<double*>(dots), i)
         : product_dot(fresh(warp), batch, static_cast<float*>(dots), i);
  }
}
