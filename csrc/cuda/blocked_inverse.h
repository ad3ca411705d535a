// damped_inverse for the largest matrices: the sweep of csrc/kernels/inverse_sweep.h by blocks of pivots, with cuBLAS
// for the products. With A = F + damping I and, for each block K of pivots in turn, the inverse W of the Cholesky
// factor of A_KK,
//
//   Y := -A_:K W^T,  Y_K := W^T,  A_:K := 0,  A_K: := 0,  A := A - Y Y^T  (lower triangle)
//
// and A ends as minus the inverse. W is made in double in the registers of one block of threads; the update goes by
// square tiles of the lower triangle, those of all matrices of one order in one call. Always in full float32: factors
// rounded to TF32 would ruin an inverse.
//
// A matrix of order n takes n^3 flops, as Cholesky and its inverse do, n^2 times the side of a tile more for tiles on
// the diagonal and 2 n^2 times the pivots for Y. ResNet-50's 108 matrices take 453 Gflop, 449 of them the 35 that go
// this way, and 75 more for the latter two: 7.8 ms at an H200's 67 Tflop/s of float32. A matrix of order 4608 passes
// through memory in each of its 36 steps, 3 GB or 0.6 ms at 4.8 TB/s.
#pragma once

#include <vector>

#include "cuda/blas.h"
#include "cuda/damped_inverse.h"

namespace kronfac::cuda {

// The pivots of a block: as many as the registers of 256 threads hold in double, 64 numbers each.
inline constexpr int32_t kMostPivots = 128;
// The side of a tile: four tiles of a library's kernel, so that half a tile on the diagonal is a small part; and from
// three to a side on, most are off the diagonal.
inline constexpr int32_t kUpdateTile = 256, kBlockedOrder = 3 * kUpdateTile;

struct BlockedProblem {
  void* x;                            // (n, n), its lower triangle
  void* u;                            // (n, pivots): A_:K, and -1 on the diagonal of K
  void* y;                            // (n, pivots)
  void* w;                            // (pivots, pivots)
  void** addresses;                   // of the matrices of one order: 3 (1 + tiles) for each
  int32_t n, index, member, members;  // member: its number among the matrices of its order
};

struct BlockedBatch {
  BlockedProblem problem[kMostMatrices];  // by descending order n
  int32_t first[kMostMatrices + 1];       // the first block of threads of each matrix in this launch
  int32_t count, pivots, tile, step;
  int32_t* info;

  static KRONFAC_BOTH int32_t cut(int32_t n, int32_t by) { return (n + by - 1) / by; }
  // Pivots of this step.
  KRONFAC_BOTH int32_t width(int32_t n) const { return n - step * pivots < pivots ? n - step * pivots : pivots; }
  // Blocks of threads for U, 64 x 64 entries each.
  KRONFAC_BOTH int32_t gathers(int32_t n) const { return cut(n, 64) * cut(pivots, 64); }

  // Tiles of the lower triangle, by rows; where the last row is lower than the others, its tiles are products of other
  // sizes: `whole` full tiles, `flat` of few rows, and the corner.
  KRONFAC_BOTH int32_t tiles(int32_t n) const { return cut(n, tile) * (cut(n, tile) + 1) / 2; }
  KRONFAC_BOTH bool ragged(int32_t n) const { return n % tile != 0; }
  KRONFAC_BOTH int32_t flat(int32_t n) const { return ragged(n) ? cut(n, tile) - 1 : 0; }
  KRONFAC_BOTH int32_t whole(int32_t n) const { return ragged(n) ? tiles(n) - flat(n) - 1 : tiles(n); }

  // As InverseBatch::layout, for the matrices that have pivots in this step.
  template <class PerMatrix>
  int32_t layout(const PerMatrix& per_matrix) {
    first[0] = 0;
    int32_t at = 0;
    for (; at < count && problem[at].n > step * pivots; ++at) first[at + 1] = first[at] + per_matrix(problem[at].n);
    const int32_t total = first[at];
    for (; at < count; ++at) first[at + 1] = total;
    return total;
  }
};

// The products of a step for the matrices of one order, of which p is the first: Y, then the updates.
inline void add_products(const BlockedBatch& batch, const BlockedProblem& p, Element type, std::vector<Gemm>& ys,
                         std::vector<Gemm>& updates) {
  const int32_t n = p.n, members = p.members, rest = n % batch.tile, total = members * batch.tiles(n);
  Gemm g{};
  g.type = g.c_type = type;
  g.pointers = true;
  g.k = batch.width(n), g.lda = g.ldb = batch.pivots, g.a_transposed = true, g.alpha = -1;
  // What lies by rows is its transpose by columns: Y^T := -W U^T.
  void** at = p.addresses;
  g.m = batch.width(n), g.n = n, g.ldc = batch.pivots, g.count = members;
  g.a = at, g.b = at + members, g.c = at + 2 * members;
  ys.push_back(g);
  // A_rc^T := A_rc^T - Y_c Y_r^T.
  at += 3 * members;
  g.ldc = n, g.beta = 1;
  const auto add = [&](int32_t columns, int32_t rows, int32_t count) {
    g.m = columns, g.n = rows, g.count = count;
    g.a = at, g.b = at + total, g.c = at + 2 * total;
    if (count > 0) updates.push_back(g);
    at += count;
  };
  add(batch.tile, batch.tile, members * batch.whole(n));
  add(batch.tile, rest, members * batch.flat(n));
  add(rest, rest, batch.ragged(n) ? members : 0);
}

// The inverses of a batch, by at most kMostPivots pivots at a time. Go makes the launches (load, finish and poison as
// in InversePart; factor, gather and addresses, blocked_inverse.cuh; products) and gives the memory they work in.
template <class Go>
void blocked_inverse(InverseBatch& matrices, int32_t pivots, int32_t tile, Element type, Go& go) {
  if (matrices.count == 0) return;
  const int64_t size = type == Element::f64 ? 8 : 4;
  BlockedBatch batch{};
  batch.count = matrices.count, batch.pivots = pivots, batch.tile = tile, batch.info = matrices.info;
  for (int32_t i = 0; i < batch.count; ++i) {
    BlockedProblem& p = batch.problem[i];
    p.x = matrices.problem[i].x, p.n = matrices.problem[i].n, p.index = matrices.problem[i].index;
    p.u = go.memory(int64_t{p.n} * pivots * size);
    p.y = go.memory(int64_t{p.n} * pivots * size);
    p.w = go.memory(int64_t{pivots} * pivots * size);
    if (i > 0 && batch.problem[i - 1].n == p.n) {
      p.member = batch.problem[i - 1].member + 1, p.members = batch.problem[i - 1].members;
      p.addresses = batch.problem[i - 1].addresses;
      continue;
    }
    for (p.members = 1; i + p.members < batch.count && matrices.problem[i + p.members].n == p.n;) ++p.members;
    const int64_t bytes = 3 * (int64_t{1} + batch.tiles(p.n)) * p.members * int64_t{sizeof(void*)};
    p.addresses = static_cast<void**>(go.memory(bytes));
  }

  go.load(matrices);
  go.addresses(batch);
  for (; batch.problem[0].n > batch.step * pivots; ++batch.step) {
    std::vector<Gemm> ys, updates;
    for (int32_t i = 0; i < batch.count && batch.problem[i].n > batch.step * pivots; ++i) {
      if (batch.problem[i].member == 0) add_products(batch, batch.problem[i], type, ys, updates);
    }
    go.factor(batch);
    go.gather(batch);
    go.products(ys);
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
