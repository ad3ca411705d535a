// Whether the memory of two tensors meets.
#pragma once

#include <cstddef>
#include <utility>

#include "common/checks.h"

namespace kronfac {

// The input, or a copy of it where its memory meets that of the output: results are written before all input has been
// read.
inline Tensor apart_from(const Tensor& out, const Tensor& input) {
  const auto range = [](const Tensor& t) {
    const int64_t size = element_bytes(t.scalar_type());
    int64_t low = 0, high = size;
    for (int64_t i = 0; i < t.dim(); ++i) {
      const int64_t extent = (t.size(i) - 1) * t.stride(i) * size;
      (extent < 0 ? low : high) += extent;
    }
    const auto* base = static_cast<const std::byte*>(t.const_data_ptr());
    return std::pair{base + low, base + high};
  };
  if (out.numel() == 0 || input.numel() == 0) return input;
  const auto [out_low, out_high] = range(out);
  const auto [in_low, in_high] = range(input);
  return out_low < in_high && in_low < out_high ? torch::stable::clone(input) : input;
}

// Whether w is, or shares entries with, a row of basis.
inline bool overlaps(const Tensor& w, const Tensor& basis) {
  const int64_t size = element_bytes(w.scalar_type()), m = basis.size(0), n = w.size(0), step = w.stride(0);
  if (m == 0 || n == 0) return false;
  const std::byte* target = static_cast<const std::byte*>(w.const_data_ptr());
  const std::byte* rows = static_cast<const std::byte*>(basis.const_data_ptr());
  for (int64_t i = 0; i < m; ++i) {
    const std::byte* row = rows + i * basis.stride(0) * size;
    const int64_t last_w = (n - 1) * step * size, last_row = (n - 1) * basis.stride(1) * size;
    if (target + last_w < row || row + last_row < target) continue;
    // Interleaved with equal steps but other offsets, as columns of one matrix, they meet nowhere.
    const int64_t distance = static_cast<int64_t>(target - row) / size;
    if (step != basis.stride(1) || step == 0 || distance % step == 0) return true;
  }
  return false;
}

}  // namespace kronfac
