// The kernel templates of covariance and its plan for cuBLAS, run on the CPU; the products of the plan by loops.
#include <memory>
#include <vector>

#include "cuda/covariance.cuh"
#include "naive_gemm.h"

using namespace kronfac::cuda;

namespace {

template <class T, class Value>
void sum_tiles(const Covariance& p, const Value& value) {
  HostBlock<SumState, kSumThreads> block;
  SumShared<T> shared;
  const int64_t across = (p.d() + kSumSide - 1) / kSumSide;
  for (int64_t tile = across * (across + 1) / 2; tile > 0; --tile) {
    covariance_sum_tile<T>(block, shared, p, tile - 1, value);
  }
}

template <class T>
void add_parts(const Covariance& p) {
  if (p.parts > 1) sum_tiles<T>(p, [&](int64_t i, int64_t j) { return covariance_from_parts<T>(p, i, j); });
}

// Tiles in falling order, parts in rising order: neither may matter.
template <class F>
void each_tile(const Covariance& p, const F& f) {
  for (int64_t tile = covariance_tiles(p); tile > 0; --tile) {
    for (int64_t part = 0; part < p.parts; ++part) f(tile - 1, part);
  }
}

template <class T>
void covariance_of(const Covariance& p) {
  using Tile = typename CovarianceTile<T>::Tile;
  const auto shared = std::make_unique<typename Tile::Shared>();
  const auto block = std::make_unique<HostBlock<CovarianceState<T>, Tile::kThreads>>();
  each_tile(p, [&](int64_t tile, int64_t part) { covariance_tile<T>(*block, *shared, p, tile, part); });
  add_parts<T>(p);
}

template <class In, bool kCopied>
void covariance_mma_of(const Covariance& p) {
  const auto shared = std::make_unique<CovarianceMmaShared<In>>();
  std::memset(shared.get(), 0xff, sizeof *shared);
  const auto block = std::make_unique<HostBlock<CovarianceMmaState<In>, MmaTile<In>::kThreads>>();
  each_tile(p, [&](int64_t tile, int64_t part) { covariance_mma_tile<In, kCopied>(*block, *shared, p, tile, part); });
  add_parts<float>(p);
}

template <class In>
bool covariance_mma_of(const Covariance& p) {
  const bool copied = MmaTile<In>::copyable(p.x, p.row, p.feature);
  copied ? covariance_mma_of<In, true>(p) : covariance_mma_of<In, false>(p);
  return copied;
}

template <class In, class T>
void finish(const Covariance& p, const CovariancePanels& panels) {
  HostBlock<SumState, kSumThreads> block;
  SumShared<T> shared;
  for (int64_t number = 0; number * kSumSide < p.features; ++number) {
    for (int64_t part = 0; part < panels.sum_parts; ++part) {
      covariance_column_sums<In, T>(block, shared, p, panels, number, part);
    }
  }
  sum_tiles<T>(p, [&](int64_t i, int64_t j) { return covariance_from_panels<T>(p, panels, i, j); });
}

// strides: 2 of x, 2 of out.
Covariance problem(int type, const void* x, void* out, int64_t m, int64_t features, const int64_t* strides, bool bias,
                   double decay, double scale) {
  Covariance p{};
  p.type = static_cast<Element>(type), p.x = x, p.out = out, p.m = m, p.features = features;
  p.row = strides[0], p.feature = strides[1], p.out_row = strides[2], p.out_column = strides[3];
  p.bias = bias, p.decay = decay, p.scale = scale, p.parts = 1;
  return p;
}

// Stands for a block where copies are begun, and looks at what they read.
template <class In>
struct CopyInspector {
  const Operand<In>& x;
  int64_t rows;
  int64_t entries = 0;
  bool inside = true;

  void copy_async(void* to, const void* from, int bytes) {
    inside = inside && bytes >= 0 && bytes <= 16 && reinterpret_cast<uintptr_t>(to) % 16 == 0 &&
             reinterpret_cast<uintptr_t>(from) % 16 == 0;
    if (bytes <= 0) return;
    const int64_t at = static_cast<const In*>(from) - x.data, count = bytes / static_cast<int64_t>(sizeof(In));
    inside = inside && at / x.k_stride < rows && at % x.k_stride + count <= x.features;
    entries += count;
  }
};

// Whether the copies of all tiles of x (m, features) read each of its entries once and nothing else.
template <class In>
bool copies_are_exact(int64_t m, int64_t features, int64_t row) {
  using Tile = MmaTile<In>;
  alignas(16) static In origin[8];
  typename Tile::Entries target;
  const Operand<In> x{origin, row, 1, features, false};
  CopyInspector<In> inspector{x, m};
  for (int64_t k = 0; k < m; k += Tile::kDepth) {
    for (int64_t i = 0; i < features; i += Tile::kSide) {
      for (int thread = 0; thread < Tile::kThreads; ++thread) Tile::copy(inspector, thread, x, k, m, i, target);
    }
  }
  return inspector.inside && inspector.entries == m * features;
}

template <class In>
void multiply_add(const uint32_t* a, const uint32_t* b, float* sum) {
  typename MultiplyAdd<In>::Lane lanes[32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = {sum + 4 * lane, a + 4 * lane, b + 2 * lane};
  MultiplyAdd<In>::run(lanes);
}

}  // namespace

extern "C" {

// results: the parts it was cut into, whether rows were copied by the copy unit.
void emulate_covariance(int type, bool tensor_cores, const void* x, void* out, int64_t m, int64_t features,
                        const int64_t* strides, bool bias, double decay, double scale, int64_t* results) {
  Covariance p = problem(type, x, out, m, features, strides, bias, decay, scale);
  p.tensor_cores = tensor_cores;
  p.parts = results[0] = covariance_parts(p);
  const size_t size = static_cast<size_t>(p.parts * p.d() * p.d());
  std::vector<double> partial(size, std::numeric_limits<double>::quiet_NaN());
  p.partial = partial.data();
  bool copied = false;
  if (p.type == Element::f32 && tensor_cores) copied = covariance_mma_of<float>(p);
  if (p.type == Element::f32 && !tensor_cores) covariance_of<float>(p);
  if (p.type == Element::f64) covariance_of<double>(p);
  if (p.type == Element::bf16) copied = covariance_mma_of<BFloat16>(p);
  if (p.type == Element::f16) copied = covariance_mma_of<Half>(p);
  results[1] = copied;
}

// shape: width of a panel, rows and columns of a tile, slots, least rows of a part. parts: of each panel.
void emulate_covariance_plan(int type, const void* x, void* out, int64_t m, int64_t features, const int64_t* strides,
                             bool bias, double decay, double scale, const int64_t* shape, int64_t* parts) {
  Covariance p = problem(type, x, out, m, features, strides, bias, decay, scale);
  const PanelShape panel_shape{shape[0], shape[1], shape[2], {shape[3], shape[4], 0, 0, 0}};
  const CovariancePanels panels = covariance_panels(p, panel_shape);
  std::vector<double> partial(static_cast<size_t>(panels.entries), std::numeric_limits<double>::quiet_NaN());
  p.partial = partial.data();
  for (const Gemm& product : covariance_products(p, panels)) execute(product);
  for (int64_t i = 0; i < panels.count; ++i) parts[i] = panels.panel[i].parts;
  if (p.type == Element::f32) finish<float, float>(p, panels);
  if (p.type == Element::f64) finish<double, double>(p, panels);
  if (p.type == Element::bf16) finish<BFloat16, float>(p, panels);
  if (p.type == Element::f16) finish<Half, float>(p, panels);
}

// What the plan for contiguous x and out would be. numbers: whether there is one, panels, their width, numbers of
// memory of its own; parts: of each panel; operations: of all products.
void covariance_plan(int type, int64_t m, int64_t features, bool bias, int64_t* numbers, int64_t* parts,
                     double* operations) {
  alignas(16) char memory[16];
  const int64_t strides[4] = {features, 1, features + bias, 1};
  const Covariance p = problem(type, memory, memory, m, features, strides, bias, 0, 1);
  const CovariancePanels panels = covariance_panels(p);
  numbers[0] = covariance_large(p) && plain_matrix(p), numbers[1] = panels.count, numbers[2] = panels.width,
  numbers[3] = panels.entries;
  for (int64_t i = 0; i < panels.count; ++i) parts[i] = panels.panel[i].parts;
  *operations = 0;
  for (const Gemm& g : covariance_products(p, panels)) {
    *operations += 2.0 * static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(g.k * g.count);
  }
}

bool covariance_copies_are_exact(bool halves, int64_t m, int64_t features, int64_t row) {
  return halves ? copies_are_exact<Half>(m, features, row) : copies_are_exact<float>(m, features, row);
}

// What is copied first. strides: of x; offset: of its first byte from a multiple of 16.
bool covariance_copies(int type, bool tensor_cores, int64_t m, int64_t features, const int64_t* strides,
                       int64_t offset) {
  alignas(16) char memory[16];
  const int64_t all[4] = {strides[0], strides[1], features, 1};
  Covariance p = problem(type, memory + offset, memory, m, features, all, false, 0, 1);
  p.tensor_cores = tensor_cores;
  return covariance_needs_copy(p, covariance_large(p));
}

int64_t covariance_tensor_core_parts(int64_t m, int64_t features) {
  Covariance p{};
  p.tensor_cores = true, p.m = m, p.features = features;
  return covariance_parts(p);
}

// One instruction of a warp; a: 4 registers of each lane, b: 2, sum: 4.
void emulate_multiply_add(int type, const uint32_t* a, const uint32_t* b, float* sum) {
  if (static_cast<Element>(type) == Element::f32) multiply_add<float>(a, b, sum);
  if (static_cast<Element>(type) == Element::bf16) multiply_add<BFloat16>(a, b, sum);
  if (static_cast<Element>(type) == Element::f16) multiply_add<Half>(a, b, sum);
}

// Four 8 x 8 matrices, one after another, into 4 registers of each lane.
void emulate_load_transposed(const uint16_t* matrices, uint32_t* fragments) {
  LoadTransposed::Lane lanes[32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = {matrices + 8 * lane, fragments + 4 * lane};
  LoadTransposed::run(lanes);
}

uint32_t emulate_tf32_bits(float x) { return tf32_bits(x); }
}
