// out := decay * out + scale * [x 1]^T [x 1] on the GPU, in the type sums are kept in (no tensor cores).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

// Strides in elements. x: (m, features) of type `type`; out: (d, d) with d = features + bias, float64 for float64
// input, else float32.
struct Covariance {
  Element type;
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

// Square tiles of the lower triangle; 64 sums of a thread in float32, 16 in float64.
KRONFAC_BOTH constexpr int covariance_side(bool wide) { return wide ? 64 : 128; }

inline int64_t covariance_tiles(const Covariance& p) {
  const int64_t side = covariance_side(p.type == Element::f64), across = (p.d() + side - 1) / side;
  return across * (across + 1) / 2;
}

// Parts of the rows with sums of their own, where the triangle has fewer tiles than a large GPU has multiprocessors.
// Depends on shapes alone, so that results do not depend on the device.
inline int64_t covariance_parts(const Covariance& p) {
  constexpr int64_t kWanted = 264, kLeastRows = 256;
  const int64_t tiles = covariance_tiles(p);
  return tiles == 0 ? 1 : std::clamp<int64_t>(std::min(kWanted / tiles, p.m / kLeastRows), 1, kWanted);
}

void covariance(const Covariance& p, Stream stream);

}  // namespace kronfac::cuda
