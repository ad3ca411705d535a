// The sizes of a call of conv_covariance, its three spatial axes counted from the outermost one. Torch-free.
#pragma once

#include <array>
#include <cstdint>

namespace kronfac {

// Maps of one or two spatial axes have leading axes of size 1. Output position p of an axis sees the entries
// p * step + i * dilation - low for i < kernel; what lies outside of [0, size) is zero.
struct ConvShape {
  int64_t images, groups, channels;  // channels of one group
  std::array<int64_t, 3> size, kernel, step, dilation, low, high, out;
  bool bias;

  int64_t offsets() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t features() const { return channels * offsets(); }
  int64_t d() const { return features() + (bias ? 1 : 0); }
  int64_t positions() const { return images * out[0] * out[1] * out[2]; }
};

}  // namespace kronfac
