// The map of conv_covariance.h in another layout.
#pragma once

#include "cuda/block.cuh"
#include "cuda/conv_covariance.h"

namespace kronfac::cuda {

template <class E>
struct ConvTransposeShared {
  E value[kConvTranspose][kConvTranspose + 1];
};

// kConvTranspose channels of as many positions of one image.
template <class E, class Block>
KRONFAC_DEVICE void conv_transpose_block(Block& block, ConvTransposeShared<E>& shared, const ConvLayout& p,
                                         int32_t number) {
  using State = typename Block::State;
  constexpr int kSide = kConvTranspose, kStep = kConvThreads / kSide;
  const int64_t positions = p.size[0] * p.size[1] * p.size[2];
  const int32_t down = static_cast<int32_t>((positions + kSide - 1) / kSide),
                across = static_cast<int32_t>((p.channels + kSide - 1) / kSide);
  const int64_t channel0 = int64_t{number % across} * kSide, position0 = int64_t{number / across % down} * kSide,
                image = number / across / down;
  const E* x = static_cast<const E*>(p.x) + image * p.image;
  E* target = static_cast<E*>(p.target) + image * positions * p.row;
  block.each([&](int thread, State&) {
    const int at = thread % kSide;
    const int64_t position = position0 + at;
    if (position >= positions) return;
    const int64_t rest = position / p.size[2];
    const E* from = x + position % p.size[2] * p.axis[2] + rest % p.size[1] * p.axis[1] + rest / p.size[1] * p.axis[0];
    KRONFAC_UNROLL
    for (int c = thread / kSide; c < kSide; c += kStep) {
      if (channel0 + c < p.channels) shared.value[c][at] = from[(channel0 + c) * p.channel];
    }
  });
  block.each([&](int thread, State&) {
    const int at = thread % kSide;
    if (channel0 + at >= p.channels) return;
    KRONFAC_UNROLL
    for (int q = thread / kSide; q < kSide; q += kStep) {
      if (position0 + q < positions) target[(position0 + q) * p.row + channel0 + at] = shared.value[at][q];
    }
  });
}

// Entry `index` of the map with its zeros.
template <class E>
KRONFAC_DEVICE void conv_pad_entry(const ConvLayout& p, int64_t index) {
  const int64_t plane = p.padded[1] * p.padded[2], map = p.padded[0] * plane;
  if (index >= p.images * p.channels * map) return;
  const int64_t x = index % p.padded[2] - p.low[2], y = index % plane / p.padded[2] - p.low[1],
                z = index % map / plane - p.low[0];
  const int64_t channel = index / map % p.channels, image = index / map / p.channels;
  const bool inside = x >= 0 && x < p.size[2] && y >= 0 && y < p.size[1] && z >= 0 && z < p.size[0];
  static_cast<E*>(p.target)[index] =
      inside ? static_cast<const E*>(
                   p.x)[image * p.image + channel * p.channel + z * p.axis[0] + y * p.axis[1] + x * p.axis[2]]
             : E(0);
}

}  // namespace kronfac::cuda
