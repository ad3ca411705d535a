// out := decay * out + scale * [x 1]^T [x 1] on the GPU, in the type sums are kept in, or with products on tensor
// cores.
//
// Three ways, of which shapes and types alone decide:
// * tensor cores (mma_tile.cuh): bfloat16, float16, and float32 where torch lets matmul round factors to TF32. Tiles of
//   the lower triangle of x^T x; the ones cost column sums that diagonal tiles take along, not a product.
// * full float32 and float64 (tile.cuh): the same tiles by multiply-adds, the ones as one more column.
// * cuBLAS for large x (covariance_plan.h): the lower triangle in panels of rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/split.h"

namespace kronfac::cuda {

// Strides in elements. x: (m, features) of type `type`; out: (d, d) with d = features + bias, float64 for float64
// input, else float32.
struct Covariance {
  Element type;
  bool tensor_cores;  // not with float64, always with bfloat16 and float16; float32 is then rounded to TF32
  const void* x;
  int64_t row, feature;
  int64_t m, features;
  bool bias;
  double decay, scale;  // decay == 0 does not read out
  void* out;
  int64_t out_row, out_column;
  void* partial;  // (parts, d, d) of out's type where parts > 1
  int64_t parts;

  KRONFAC_BOTH int64_t d() const { return features + (bias ? 1 : 0); }
};

// Square tiles of the lower triangle; 64 sums of a thread in float32, 16 in float64, 128 on tensor cores.
KRONFAC_BOTH constexpr int covariance_side(bool wide) { return wide ? 64 : 128; }
constexpr int kMmaSide = 128;

inline int64_t covariance_tiles(const Covariance& p) {
  const int64_t side = p.tensor_cores ? kMmaSide : covariance_side(p.type == Element::f64),
                size = p.tensor_cores ? std::max<int64_t>(p.features, 1) : p.d(), across = (size + side - 1) / side;
  return across * (across + 1) / 2;
}

// Parts of the rows with sums of their own, where the triangle has fewer tiles than a large GPU computes at once.
// Depends on shapes alone, so that results do not depend on the device.
inline int64_t covariance_parts(const Covariance& p) {
  const int64_t tiles = covariance_tiles(p);
  if (p.tensor_cores) {
    // Two tiles on each of 132 multiprocessors; a row of such a round takes 25 ns at half of the rate of mma.sync, sums
    // of a tile 33 ns to write and read, an addend 75 ns of waiting for memory.
    constexpr Split kMma{264, 256, 64, 1.3, 3};
    return split_parts(kMma, tiles, p.m, kMma.slots);
  }
  constexpr int64_t kWanted = 264, kLeastRows = 256;
  return tiles == 0 ? 1 : std::clamp<int64_t>(std::min(kWanted / tiles, p.m / kLeastRows), 1, kWanted);
}

void covariance(const Covariance& p, Stream stream);

}  // namespace kronfac::cuda
