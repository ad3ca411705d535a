// Kernel templates of blocked_inverse.h.
#pragma once

#include "cuda/blocked_inverse.h"
#include "cuda/damped_inverse.cuh"

namespace kronfac::cuda {

// W of a part of the pivots of one matrix, from their rows of U. Then these rows are those of pivots: -1 on the
// diagonal, from which Y becomes W^T, and 0 in the columns of later pivots; and what earlier pivots' Y has there is
// used up.
template <class T, class Block>
KRONFAC_DEVICE void factor_block(Block& block, FactorShared& shared, const BlockedBatch& batch, int32_t number) {
  const BlockedProblem& p = batch.problem[number];
  if (batch.info[p.index] != 0) return;
  const int width = batch.part_width(p.n), columns = batch.width(p.n), from = batch.part * kPivots;
  const int64_t row0 = batch.part_start(), across = batch.block;
  T* u = static_cast<T*>(p.u) + row0 * across;
  T* y = static_cast<T*>(p.y) + row0 * across;
  T* w = static_cast<T*>(p.w);
  const int32_t info = factor(
      block, shared, width, [&](int i, int j) { return static_cast<double>(u[i * across + from + j]); },
      [&](int i, int j, double value) {
        const T rounded = static_cast<T>(value);
        w[i * kPivots + j] = rounded;
        return finite(rounded);
      });
  block.each([&](int thread, typename Block::State&) {
    if (thread == 0 && info != 0) batch.info[p.index] = info > 0 ? static_cast<int32_t>(row0) + info : info;
    for (int at = thread; at < kPivots * columns; at += kInverseThreads) {
      const int i = at / columns, k = at % columns;
      if (i >= width) continue;
      if (k < from) {
        y[i * across + k] = T(0);
      } else {
        u[i * across + k] = k == from + i ? T(-1) : T(0);
      }
    }
  });
}

// 64 x 64 entries of U; what is read there is 0 in A from then on.
template <class T, class Block>
KRONFAC_DEVICE void gather_block(Block& block, const BlockedBatch& batch, int32_t number) {
  const int32_t matrix = problem_of(batch, number);
  const BlockedProblem& p = batch.problem[matrix];
  if (batch.info[p.index] != 0) return;
  const int32_t local = number - batch.first[matrix], width = batch.width(p.n);
  const int32_t pivot0 = local % batch.parts() * kPivots;
  const int64_t n = p.n, row0 = local / batch.parts() * int64_t{kPivots}, start = batch.start();
  // Neighbouring threads take neighbours in the matrix' memory: pivots, or, above them, where columns are rows, rows.
  const bool by_rows = row0 < start;
  T* x = static_cast<T*>(p.x);
  T* u = static_cast<T*>(p.u);
  block.each([&](int thread, typename Block::State&) {
    for (int at = thread; at < kPivots * kPivots; at += kInverseThreads) {
      const int64_t i = row0 + (by_rows ? at % kPivots : at / kPivots);
      const int32_t k = pivot0 + (by_rows ? at / kPivots : at % kPivots);
      if (i >= n || k >= width) continue;
      const int64_t pivot = start + k;
      T value = T(0);  // above the diagonal of the pivots' own block
      if (i < start || i >= pivot) {
        T& entry = i < start ? x[pivot * n + i] : x[i * n + pivot];
        value = entry;
        entry = T(0);
      }
      u[i * batch.block + k] = value;
    }
  });
}

// The addresses that BlockedProducts counts on, of one matrix.
template <class T, class Block>
KRONFAC_DEVICE void addresses_of(Block& block, const BlockedBatch& batch, int32_t number) {
  const BlockedProblem& p = batch.problem[number];
  const int32_t members = p.members, tiles = batch.tiles(p.n), whole = batch.whole(p.n), flat = batch.flat(p.n);
  const int64_t total = int64_t{members} * tiles, side = batch.tile, across = batch.block;
  const int32_t parts = batch.parts(), steps = BlockedBatch::cut(p.n, batch.block);
  T* x = static_cast<T*>(p.x);
  T* u = static_cast<T*>(p.u);
  T* y = static_cast<T*>(p.y);
  const auto set = [&](int32_t list, void* a, void* b, void* c) {
    void** const at = p.addresses + int64_t{3} * list * members + p.member;
    at[0] = a, at[members] = b, at[2 * members] = c;
  };
  block.each([&](int thread, typename Block::State&) {
    for (int32_t part = thread; part < parts; part += kInverseThreads) {
      set(batch.list_of_y(part), p.w, u + part * kPivots, y + part * kPivots);
    }
    for (int32_t at = thread; at < steps * parts; at += kInverseThreads) {
      const int32_t step = at / parts, part = at % parts, next = (part + 1) * kPivots;
      // No row of Y where there are no later pivots, and no product.
      const bool later = int64_t{step} * batch.block + next < p.n && part + 1 < parts;
      T* const rows = later ? y + (step * across + next) * across + part * kPivots : y;
      set(batch.list_of_u(step, part), rows, y + part * kPivots, later ? u + next : u);
    }
    void** const target = p.addresses + int64_t{3} * batch.list_of_tiles(p.n) * members;
    for (int32_t local = thread; local < tiles; local += kInverseThreads) {
      const LowerTile tile = lower_tile(local);
      int64_t at = int64_t{p.member} * whole + local;
      if (local >= whole) at = int64_t{members} * whole + int64_t{p.member} * flat + (local - whole);
      if (local >= whole + flat) at = int64_t{members} * (whole + flat) + p.member;
      target[at] = y + tile.column * side * across;
      target[total + at] = y + tile.row * side * across;
      target[2 * total + at] = x + tile.row * side * p.n + tile.column * side;
    }
  });
}

}  // namespace kronfac::cuda
