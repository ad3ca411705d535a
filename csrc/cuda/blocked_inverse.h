// damped_inverse for the largest matrices: the sweep of damped_inverse.h with cuBLAS for the products. So that a pass
// over the matrix is worth it, `block` / 64 blocks of 64 pivots are swept first in their own columns U of the matrix,
// which gives as many columns of Y, before A := A - Y Y^T goes over the rest. That update goes by square tiles of the
// lower triangle, those of all matrices of one order in one call. Always in full float32: factors rounded to TF32 would
// ruin an inverse.
//
// A matrix of order n takes n^3 flops, as Cholesky and its inverse do, n^2 times the side of a tile more for tiles on
// the diagonal and 320 n^2 for U and Y. ResNet-50's 108 matrices take 453 Gflop, 449 of them the 35 that go this way,
// and 84 more for the latter two: 8 ms at an H200's 67 Tflop/s of float32. A matrix of order 4608 passes through memory
// in each of its 18 steps, 1.5 GB or 0.3 ms at 4.8 TB/s.
#pragma once

#include <vector>

#include "cuda/blas.h"
#include "cuda/damped_inverse.h"

namespace kronfac::cuda {

// Four blocks of 64 pivots to an update: an entry of A is read and written for 512 flops, where the kernels of
// damped_inverse.h have 128. The tile is four of a library's kernel, so that half a tile on the diagonal is a small
// part; from three to a side on, most are off the diagonal.
inline constexpr int32_t kUpdatePivots = 256, kUpdateTile = 256, kBlockedOrder = 3 * kUpdateTile;

struct BlockedProblem {
  void* x;                            // (n, n), its lower triangle
  void* u;                            // (n, block): A in the columns of the pivots
  void* y;                            // (n, block)
  void* w;                            // (kPivots, kPivots)
  void** addresses;                   // of the matrices of one order: addresses_of() for each
  int32_t n, index, member, members;  // member: its number among the matrices of its order
};

struct BlockedBatch {
  BlockedProblem problem[kMostMatrices];   // by descending order n
  int32_t first[kMostMatrices + 1];        // the first block of threads of each matrix in this launch
  int32_t count, block, tile, step, part;  // part: which kPivots of the step's pivots
  int32_t* info;

  static KRONFAC_BOTH int32_t cut(int32_t n, int32_t by) { return (n + by - 1) / by; }
  KRONFAC_BOTH int32_t parts() const { return block / kPivots; }
  // The first pivot of this step, and of this part of it; how many pivots there are from there on.
  KRONFAC_BOTH int32_t start() const { return step * block; }
  KRONFAC_BOTH int32_t part_start() const { return start() + part * kPivots; }
  KRONFAC_BOTH int32_t width(int32_t n) const { return n - start() < block ? n - start() : block; }
  KRONFAC_BOTH int32_t part_width(int32_t n) const { return n - part_start() < kPivots ? n - part_start() : kPivots; }
  // Blocks of threads for U, 64 x 64 entries each.
  KRONFAC_BOTH int32_t gathers(int32_t n) const { return cut(n, kPivots) * parts(); }

  // Tiles of the lower triangle, by rows; where the last row is lower than the others, its tiles are products of other
  // sizes: `whole` full tiles, `flat` of few rows, and the corner.
  KRONFAC_BOTH int32_t tiles(int32_t n) const { return cut(n, tile) * (cut(n, tile) + 1) / 2; }
  KRONFAC_BOTH bool ragged(int32_t n) const { return n % tile != 0; }
  KRONFAC_BOTH int32_t flat(int32_t n) const { return ragged(n) ? cut(n, tile) - 1 : 0; }
  KRONFAC_BOTH int32_t whole(int32_t n) const { return ragged(n) ? tiles(n) - flat(n) - 1 : tiles(n); }

  // Lists of three addresses for each matrix of an order n: for Y in each part, for U in each step and part, for tiles.
  KRONFAC_BOTH int32_t list_of_y(int32_t at_part) const { return at_part; }
  KRONFAC_BOTH int32_t list_of_u(int32_t at_step, int32_t at_part) const { return parts() * (1 + at_step) + at_part; }
  KRONFAC_BOTH int32_t list_of_tiles(int32_t n) const { return list_of_u(cut(n, block), 0); }
  KRONFAC_BOTH int32_t lists(int32_t n) const { return list_of_tiles(n) + tiles(n); }

  // As InverseBatch::layout, for the matrices that have pivots from `least` on.
  template <class PerMatrix>
  int32_t layout(int32_t least, const PerMatrix& per_matrix) {
    return lay_out(problem, count, first, least, per_matrix);
  }
};

// The products of this step and part for the matrices of one order, of which p is the first. What lies by rows is its
// transpose by columns.
class BlockedProducts {
 public:
  BlockedProducts(const BlockedBatch& batch, const BlockedProblem& p, Element type) : batch_(batch), p_(p) {
    gemm_.type = gemm_.c_type = type;
    gemm_.pointers = gemm_.a_transposed = true;
    gemm_.alpha = -1;
    gemm_.lda = gemm_.ldb = gemm_.ldc = batch.block;
  }

  // The part's columns of Y^T := -W U^T.
  Gemm y() const {
    Gemm g = gemm_;
    g.m = g.k = batch_.part_width(p_.n), g.n = p_.n, g.lda = kPivots;
    return with(g, batch_.list_of_y(batch_.part), 0, p_.members, p_.members);
  }
  // The later parts' columns of U^T := U^T - Y_later Y^T, with Y's rows of their pivots; empty after the last part.
  Gemm u() const {
    Gemm g = gemm_;
    const int32_t later = batch_.width(p_.n) - (batch_.part + 1) * kPivots;
    g.m = later > 0 ? later : 0, g.n = p_.n, g.k = kPivots, g.beta = 1;
    return with(g, batch_.list_of_u(batch_.step, batch_.part), 0, p_.members, p_.members);
  }
  // A_rc^T := A_rc^T - Y_c Y_r^T.
  void updates(std::vector<Gemm>& list) const {
    const int32_t n = p_.n, members = p_.members, rest = n % batch_.tile, total = members * batch_.tiles(n);
    Gemm g = gemm_;
    g.k = batch_.width(n), g.ldc = n, g.beta = 1;
    int32_t at = 0;
    const auto add = [&](int32_t columns, int32_t rows, int32_t count) {
      g.m = columns, g.n = rows;
      if (count > 0) list.push_back(with(g, batch_.list_of_tiles(n), at, count, total));
      at += count;
    };
    add(batch_.tile, batch_.tile, members * batch_.whole(n));
    add(batch_.tile, rest, members * batch_.flat(n));
    add(rest, rest, batch_.ragged(n) ? members : 0);
  }

 private:
  // `count` addresses from number `at` on of the lists from `list` on, each of `total`.
  Gemm with(Gemm g, int32_t list, int32_t at, int32_t count, int32_t total) const {
    void** const first = p_.addresses + int64_t{3} * list * p_.members + at;
    g.a = first, g.b = first + total, g.c = first + int64_t{2} * total, g.count = count;
    return g;
  }

  const BlockedBatch& batch_;
  const BlockedProblem& p_;
  Gemm gemm_;
};

// The inverses of a batch; `block` is a multiple of kPivots. Go makes the launches (load, finish and poison as in
// InversePart; factor, gather and addresses, blocked_inverse.cuh; products) and gives the memory they work in.
template <class Go>
void blocked_inverse(InverseBatch& matrices, int32_t block, int32_t tile, Element type, Go& go) {
  if (matrices.count == 0) return;
  const int64_t size = type == Element::f64 ? 8 : 4;
  BlockedBatch batch{};
  batch.count = matrices.count, batch.block = block, batch.tile = tile, batch.info = matrices.info;
  for (int32_t i = 0; i < batch.count; ++i) {
    BlockedProblem& p = batch.problem[i];
    p.x = matrices.problem[i].x, p.n = matrices.problem[i].n, p.index = matrices.problem[i].index;
    p.u = go.memory(int64_t{p.n} * block * size);
    p.y = go.memory(int64_t{p.n} * block * size);
    p.w = go.memory(int64_t{kPivots} * kPivots * size);
    if (i > 0 && batch.problem[i - 1].n == p.n) {
      p.member = batch.problem[i - 1].member + 1, p.members = batch.problem[i - 1].members;
      p.addresses = batch.problem[i - 1].addresses;
      continue;
    }
    for (p.members = 1; i + p.members < batch.count && matrices.problem[i + p.members].n == p.n;) ++p.members;
    p.addresses = static_cast<void**>(go.memory(int64_t{3} * batch.lists(p.n) * p.members * int64_t{sizeof(void*)}));
  }
  // Calls f for the products of each order that has pivots from `least` on.
  const auto each_order = [&](int32_t least, const auto& f) {
    for (int32_t i = 0; i < batch.count && batch.problem[i].n > least; ++i) {
      if (batch.problem[i].member == 0) f(BlockedProducts(batch, batch.problem[i], type));
    }
  };

  go.load(matrices);
  go.addresses(batch);
  for (; batch.problem[0].n > batch.start(); ++batch.step) {
    batch.part = 0;
    go.gather(batch);
    for (; batch.part < batch.parts() && batch.problem[0].n > batch.part_start(); ++batch.part) {
      std::vector<Gemm> ys, us;
      each_order(batch.part_start(), [&](const BlockedProducts& products) {
        ys.push_back(products.y());
        us.push_back(products.u());
      });
      go.factor(batch);
      go.products(ys);
      go.products(us);
    }
    std::vector<Gemm> updates;
    each_order(batch.start(), [&](const BlockedProducts& products) { products.updates(updates); });
    go.products(updates);
  }
  go.finish(matrices);
  go.poison(matrices);
}

// The launches on the GPU; the rest of them is invert_part().
void factor_pivots(Element type, BlockedBatch& batch, Stream stream);
void gather_pivots(Element type, BlockedBatch& batch, Stream stream);
void blocked_addresses(Element type, BlockedBatch& batch, Stream stream);

}  // namespace kronfac::cuda
