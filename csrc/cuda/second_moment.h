// out := decay * out + scale * sum_n (g_n^T [x_n 1])^2 on the GPU. Torch-free: the glue fills in the structure.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

// Strides in elements. g: (examples, positions, outputs), x: (examples, positions, inputs), both of type `type`; out:
// (outputs, inputs + bias), float64 for float64 input, else float32.
struct SecondMoment {
  Element type;
  const void* g;
  const void* x;
  int64_t g_example, g_position, g_feature;
  int64_t x_example, x_position, x_feature;
  int64_t examples, positions, outputs, inputs;
  bool bias;
  double decay, scale;  // decay == 0 does not read out
  void* out;
  int64_t out_row, out_column;
  void* partial;  // (parts, outputs, inputs + bias) of out's type where parts > 1
  int64_t parts;

  KRONFAC_BOTH int64_t columns() const { return inputs + (bias ? 1 : 0); }
};

// The tile of the result that a block of threads forms. Sums and sums of squares are 32 + 32 registers of a thread, so
// that two blocks fit on a multiprocessor.
inline constexpr int kSecondMomentRows = 128, kSecondMomentColumns = 64;
inline constexpr int kSecondMomentWideRows = 64, kSecondMomentWideColumns = 64;  // float64

// Parts of the examples with sums of their own, where the result has fewer tiles than a large GPU has multiprocessors.
// Depends on shapes alone, so that results do not depend on the device.
inline int64_t second_moment_parts(const SecondMoment& p) {
  constexpr int64_t kWanted = 264, kLeastSteps = 16, kDepth = 8;
  const bool wide = p.type == Element::f64;
  const int64_t rows = wide ? kSecondMomentWideRows : kSecondMomentRows,
                columns = wide ? kSecondMomentWideColumns : kSecondMomentColumns;
  const int64_t tiles = ((p.outputs + rows - 1) / rows) * ((p.columns() + columns - 1) / columns);
  if (tiles == 0 || p.examples == 0) return 1;
  const int64_t work = p.positions == 1 ? p.examples / kDepth : p.examples * ((p.positions + kDepth - 1) / kDepth);
  return std::clamp<int64_t>(std::min({kWanted / tiles, work / kLeastSteps, p.examples}), 1, 1024);
}

void second_moment(const SecondMoment& p, Stream stream);

}  // namespace kronfac::cuda
