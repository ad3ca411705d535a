// How conv_covariance.h makes the result of the sums of products.
#pragma once

#include "cuda/conv_covariance.cuh"

namespace kronfac::cuda {

// The sums of all parts of a box, added in order and put where those of the first one were.
template <class T>
KRONFAC_DEVICE void conv_reduce(const ConvCovariance& p, int64_t index) {
  const int64_t unit = p.unit(), entry = index % unit, box_of_group = index / unit;
  const int64_t group = box_of_group / p.boxes;
  if (group >= p.groups) return;
  const ConvBox& box = p.box[box_of_group % p.boxes];
  const int64_t i = entry / p.rows, j = entry % p.rows;
  if (box.parts == 1 || (i == p.rows ? !(p.bias && box.symmetric) : box.symmetric && j > i)) return;
  T* sums = conv_sums<T>(p, group, box, 0) + entry;
  T sum = 0;
  KRONFAC_UNROLL_BY(8)
  for (int32_t part = 0; part < box.parts; ++part) sum += sums[part * unit];
  *sums = sum;
}

// The boxes that a pair of kernel offsets is the sum of.
struct ConvPairBoxes {
  int32_t first[3], last[3], ranges[3], start;

  KRONFAC_DEVICE int32_t box(int32_t z, int32_t y, int32_t x) const {
    return start + (z * ranges[1] + y) * ranges[2] + x;
  }
};
KRONFAC_DEVICE ConvPairBoxes conv_pair(const ConvCovariance& p, int32_t left, int32_t right) {
  ConvPairBoxes boxes;
  int32_t combination = 0, scale = 1;
  KRONFAC_UNROLL
  for (int axis = 2; axis >= 0; --axis) {
    const int32_t kernel = p.kernel[axis];
    const ConvPair pair = p.pair[axis][left % kernel * kernel + right % kernel];
    boxes.first[axis] = pair.first;
    boxes.last[axis] = pair.last;
    boxes.ranges[axis] = p.ranges[axis][pair.term];
    combination += scale * pair.term;
    scale *= p.terms[axis];
    left /= kernel;
    right /= kernel;
  }
  boxes.start = p.combination[combination];
  return boxes;
}

// Entry `at` of the sums of a pair, its boxes added in order.
template <class T>
KRONFAC_DEVICE T conv_pair_sum(const ConvCovariance& p, int64_t group, const ConvPairBoxes& boxes, int64_t at) {
  T sum = 0;
  for (int32_t z = boxes.first[0]; z < boxes.last[0]; ++z) {
    for (int32_t y = boxes.first[1]; y < boxes.last[1]; ++y) {
      for (int32_t x = boxes.first[2]; x < boxes.last[2]; ++x) {
        sum += conv_sums<T>(p, group, p.box[boxes.box(z, y, x)], 0)[at];
      }
    }
  }
  return sum;
}

template <class T>
KRONFAC_DEVICE void conv_write(const ConvCovariance& p, int64_t group, int64_t row, int64_t column, T sum) {
  T& entry = static_cast<T*>(p.out)[group * p.out_group + row * p.out_row + column * p.out_column];
  const T value = static_cast<T>(p.scale) * sum;
  entry = p.decay == 0 ? value : static_cast<T>(p.decay) * entry + value;
}

template <class T>
struct ConvAssembleShared {
  // One more, so that neighbouring channels meet different banks.
  T value[kConvAssemble][kConvAssemble * kConvOffsets + 1];
  ConvPairBoxes boxes[kConvOffsets];
};

// Rows of the result for one offset of kConvAssemble channels, columns for all offsets of kConvAssemble channels. Both
// triangles are put together from the same sums in the same order: the term added is symmetric to the last bit.
template <class T, class Block>
KRONFAC_DEVICE void conv_assemble(Block& block, ConvAssembleShared<T>& shared, const ConvCovariance& p,
                                  int32_t number) {
  using State = typename Block::State;
  constexpr int kSide = kConvAssemble;
  static_assert(kConvThreads == kSide * kSide && kSide * kConvOffsets <= kConvThreads);
  const int32_t across = static_cast<int32_t>((p.rows + kSide - 1) / kSide), offsets = p.offsets();
  const int32_t left = number % offsets, tile = number / offsets;
  const int64_t column0 = int64_t{tile % across} * kSide, row0 = int64_t{tile / across % across} * kSide,
                group = tile / across / across;
  for (int32_t offset0 = 0; offset0 < offsets; offset0 += kConvOffsets) {
    const int32_t count = offset0 + kConvOffsets < offsets ? kConvOffsets : offsets - offset0;
    block.each([&](int thread, State&) {
      const int32_t right = offset0 + thread;
      if (thread < count) {
        shared.boxes[thread] = conv_pair(p, right < left ? right : left, right < left ? left : right);
      }
    });
    block.each([&](int thread, State&) {
      for (int32_t o = 0; o < count; ++o) {
        const int32_t right = offset0 + o;
        // Neighbouring threads read neighbours in memory, whether the sums are those of the pair or their transpose.
        const bool transposed = left == right ? row0 < column0 : right < left;
        const int r = transposed ? thread % kSide : thread / kSide, c = transposed ? thread / kSide : thread % kSide;
        const int64_t i = row0 + r, j = column0 + c;
        if (i >= p.rows || j >= p.rows) continue;
        const bool swapped = left == right ? i < j : right < left;
        const int64_t at = swapped ? j * p.rows + i : i * p.rows + j;
        shared.value[r][c * count + o] = conv_pair_sum<T>(p, group, shared.boxes[o], at);
      }
    });
    block.each([&](int thread, State&) {
      const int32_t c = thread / count;
      const int64_t j = column0 + c;
      if (c >= kSide || j >= p.rows) return;
      const int height = static_cast<int>(p.rows - row0 < kSide ? p.rows - row0 : kSide);
      KRONFAC_UNROLL_BY(1)
      for (int r = 0; r < height; ++r) {
        conv_write<T>(p, group, (row0 + r) * offsets + left, j * offsets + offset0 + (thread - c * count),
                      shared.value[r][thread]);
      }
    });
  }
}

// Entry `index` of the last row and column.
template <class T>
KRONFAC_DEVICE void conv_bias(const ConvCovariance& p, int64_t index) {
  const int64_t d = p.d(), blocks = (d + kConvThreads - 1) / kConvThreads, width = blocks * kConvThreads;
  const int64_t group = index / width, row = index % width;
  if (row >= d) return;
  if (row == d - 1) {
    conv_write<T>(p, group, row, row, static_cast<T>(p.positions));
    return;
  }
  const int32_t offset = static_cast<int32_t>(row % p.offsets());
  const ConvPairBoxes boxes = conv_pair(p, offset, offset);
  const T sum = conv_pair_sum<T>(p, group, boxes, p.rows * p.rows + row / p.offsets());
  conv_write<T>(p, group, row, d - 1, sum);
  conv_write<T>(p, group, d - 1, row, sum);
}

}  // namespace kronfac::cuda
