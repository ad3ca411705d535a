// The chains of kron_precondition and eigen_precondition for layers that are large enough to go through cuBLAS, as
// lists of Gemm with what comes before and after them. No torch in here.
//
// ResNet-50 (54 layers, 156 Gflop in the two products of kron_precondition, twice that in the four of
// eigen_precondition): 18 layers are large and have 146 of the 156. Floors on an H200: 2.2 ms at 67 Tflop/s of float32,
// 0.3 ms at 495 Tflop/s of TF32; the sums after them read results and gradients, 2 x 84 MB, in 35 us at 4.8 TB/s.
#pragma once

#include <vector>

#include "cuda/blas.h"
#include "cuda/precondition.h"

namespace kronfac::cuda {

// From this many entries of the gradient on, a quarter of the multiprocessors of an H100 has a tile of 128 x 128 to
// itself, and a product takes several times the few microseconds of a call by itself. Narrow layers do few operations
// for each entry and stay in the launch that all small ones share.
inline constexpr int64_t kLargeEntries = int64_t{1} << 19, kLargeSide = 256;
inline bool large_layer(int64_t rows, int64_t columns) {
  return rows * columns >= kLargeEntries && rows >= kLargeSide && columns >= kLargeSide;
}

struct LargeLayer {
  View grad, left, right;  // (rows, columns), (rows, rows), (columns, columns)
  View eigenvalues;        // (rows, columns), eigen_precondition only
  void* out;               // (rows, columns), contiguous, of the gradient's type
  int64_t rows, columns;
  int32_t index;  // in damping and dots
};

// Whether cuBLAS takes a (rows, columns) matrix as it lies: neighbours in memory in one direction.
inline bool cublas_takes(const View& v, int64_t rows, int64_t columns) {
  return (v.column == 1 && v.row >= columns) || (v.row == 1 && v.column >= rows);
}

// c := a b for such a (m, k) and b (k, n) and c (m, n) contiguous by rows, which is c^T = b^T a^T by columns.
inline Gemm gemm_of(Element type, const View& a, const View& b, int64_t m, int64_t k, int64_t n, void* c) {
  Gemm g{};
  g.m = n, g.n = m, g.k = k, g.type = g.c_type = type;
  g.a = b.data, g.a_transposed = !(b.column == 1 && b.row >= n), g.lda = g.a_transposed ? b.column : b.row;
  g.b = a.data, g.b_transposed = !(a.column == 1 && a.row >= k), g.ldb = g.b_transposed ? a.column : a.row;
  g.c = c, g.ldc = n;
  return g;
}

// Products of one geometry become one batch, so that together they fill the device. Their addresses are added to
// `addresses`. An address that is no multiple of 16 bytes stays out: cuBLAS sees those of a batch only on the device.
inline std::vector<Gemm> together(const std::vector<Gemm>& gemms, Addresses& addresses) {
  const auto aligned = [](const Gemm& g) {
    const auto bits = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    return (bits(g.a) | bits(g.b) | bits(g.c)) % 16 == 0;
  };
  const auto alike = [](const Gemm& g, const Gemm& h) {
    return g.m == h.m && g.n == h.n && g.k == h.k && g.lda == h.lda && g.ldb == h.ldb && g.ldc == h.ldc &&
           g.a_transposed == h.a_transposed && g.b_transposed == h.b_transposed;
  };
  std::vector<Gemm> result;
  std::vector<bool> done(gemms.size(), false);
  for (size_t i = 0; i < gemms.size(); ++i) {
    if (done[i]) continue;
    std::vector<const Gemm*> group{&gemms[i]};
    for (size_t j = i + 1; j < gemms.size() && aligned(gemms[i]); ++j) {
      if (done[j] || !aligned(gemms[j]) || !alike(gemms[i], gemms[j])) continue;
      group.push_back(&gemms[j]);
      done[j] = true;
    }
    Gemm g = gemms[i];
    g.count = static_cast<int64_t>(group.size());
    if (g.count > 1) {
      const auto list = [&](const void* Gemm::* matrix) {
        const void** const first = addresses.target + addresses.count;
        for (const Gemm* one : group) addresses.address[addresses.count++] = one->*matrix;
        return first;
      };
      g.a = list(&Gemm::a);
      g.b = list(&Gemm::b);
      const void** const first = addresses.target + addresses.count;
      for (const Gemm* one : group) addresses.address[addresses.count++] = one->c;
      g.c = first;
      g.pointers = true;
    }
    result.push_back(g);
  }
  return result;
}

// At most kMostLayers layers of one gradient type. Go: the launches, on the GPU (layers.h) or in a test.
template <class Go>
class LargeChain {
 public:
  LargeChain(const std::vector<LargeLayer>& layers, Go& go)
      : layers_(layers),
        go_(go),
        type_(go.wide() ? Element::f64 : Element::f32),
        narrow_(go.grad() == Element::bf16 || go.grad() == Element::f16) {}

  // out := left grad right, dots := <out, grad>.
  void kron() {
    std::vector<Gemm> lists[2];
    std::vector<Product> ends;
    for (const LargeLayer& l : layers_) {
      void* const inner = memory(l);
      void* const product = narrow_ ? memory(l) : l.out;
      lists[0].push_back(of_grad(l, l.left, inner));
      lists[1].push_back(from_right(l, inner, l.right, product));
      ends.push_back(end(l, product, narrow_ ? l.out : nullptr, l.grad));
    }
    prepare(lists, 2);
    go_.products(lists[0]);
    go_.products(lists[1]);
    sum(ends, Finish::dot, nullptr, 0);
  }

  // out := Q_L [(Q_L^T grad Q_R) / (E + damping)] Q_R^T; dots from the middle, where terms are of one sign.
  void eigen(const void* damping, int64_t damping_stride) {
    std::vector<Gemm> lists[4];
    std::vector<Product> middles, ends;
    for (const LargeLayer& l : layers_) {
      void* const inner = memory(l);
      void* const middle = memory(l);
      const View in_basis{middle, l.columns, 1};
      lists[0].push_back(of_grad(l, l.left.transposed(), inner));
      lists[1].push_back(from_right(l, inner, l.right, middle));
      lists[2].push_back(
          gemm_of(type_, factor(l.left, l.rows, l.rows, false), in_basis, l.rows, l.rows, l.columns, inner));
      middles.push_back(end(l, middle, middle, l.eigenvalues));
      // The last product of a narrow gradient takes the place of the middle one, which has been used by then.
      lists[3].push_back(from_right(l, inner, l.right.transposed(), narrow_ ? middle : l.out));
      if (narrow_) ends.push_back(end(l, middle, l.out, l.grad));
    }
    prepare(lists, 4);
    go_.products(lists[0]);
    go_.products(lists[1]);
    sum(middles, Finish::divide, damping, damping_stride);
    go_.products(lists[2]);
    go_.products(lists[3]);
    each_batch_of(ends, [&](ProductBatch& batch) { go_.finish(batch, Finish::rounded, false); });
  }

 private:
  void* memory(const LargeLayer& l) { return go_.memory(l.rows * l.columns * (go_.wide() ? 8 : 4)); }

  // A matrix as cuBLAS takes it, in the type of the products: itself, or a copy that prepare() makes.
  View factor(const View& v, int64_t rows, int64_t columns, bool narrow) {
    if (!narrow && cublas_takes(v, rows, columns)) return v;
    Product p{};
    p.a = v.data, p.a_row = v.row, p.a_k = v.column;
    p.m = static_cast<int32_t>(rows), p.n = static_cast<int32_t>(columns);
    p.c = go_.memory(rows * columns * (go_.wide() ? 8 : 4));
    (narrow ? narrow_copies_ : copies_).push_back(p);
    return {p.c, columns, 1};
  }
  Gemm of_grad(const LargeLayer& l, const View& left, void* c) {
    const View a = factor(left, l.rows, l.rows, false), b = factor(l.grad, l.rows, l.columns, narrow_);
    return gemm_of(type_, a, b, l.rows, l.rows, l.columns, c);
  }
  Gemm from_right(const LargeLayer& l, const void* a, const View& right, void* c) {
    const View b = factor(right, l.columns, l.columns, false);
    return gemm_of(type_, {a, l.columns, 1}, b, l.rows, l.columns, l.columns, c);
  }
  static Product end(const LargeLayer& l, const void* from, void* to, const View& other) {
    Product p{};
    p.a = from, p.a_row = l.columns, p.a_k = 1, p.c = to;
    p.other = other.data, p.other_row = other.row, p.other_column = other.column;
    p.m = static_cast<int32_t>(l.rows), p.n = static_cast<int32_t>(l.columns), p.index = l.index;
    return p;
  }

  template <class Run>
  void each_batch_of(const std::vector<Product>& products, const Run& run) {
    for (size_t at = 0; at < products.size();) {
      ProductBatch batch{};
      while (at < products.size() && batch.count < kMostLayers) batch.problem[batch.count++] = products[at++];
      batch.layout(true);
      run(batch);
    }
  }
  void prepare(std::vector<Gemm>* lists, int count) {
    each_batch_of(copies_, [&](ProductBatch& batch) { go_.finish(batch, Finish::store, false); });
    each_batch_of(narrow_copies_, [&](ProductBatch& batch) { go_.finish(batch, Finish::store, true); });
    if (!go_.together() || layers_.size() < 2) return;
    Addresses addresses{};
    addresses.target = static_cast<const void**>(go_.memory(kMostAddresses * int64_t{sizeof(void*)}));
    for (int i = 0; i < count; ++i) lists[i] = together(lists[i], addresses);
    go_.addresses(addresses);
  }
  void sum(const std::vector<Product>& products, Finish finish, const void* damping, int64_t damping_stride) {
    each_batch_of(products, [&](ProductBatch& batch) {
      batch.damping = damping, batch.damping_stride = damping_stride;
      batch.partial = static_cast<double*>(go_.memory(batch.first[batch.count] * int64_t{sizeof(double)}));
      go_.finish(batch, finish, false);
      go_.dots(batch);
    });
  }

  const std::vector<LargeLayer>& layers_;
  Go& go_;
  Element type_;
  bool narrow_;
  std::vector<Product> copies_, narrow_copies_;
};

}  // namespace kronfac::cuda
