// Kernel templates of conv_covariance.h.
#pragma once

#include "cuda/conv_covariance.h"
#include "cuda/tile.cuh"

namespace kronfac::cuda {

// Sums of a thread and their totals are 32 + 32 registers in float32, so that four blocks of 128 threads fit on a
// multiprocessor.
template <class T, int kSide>
struct ConvTile;
template <>
struct ConvTile<float, 64> {
  using Tile = cuda::Tile<float, 64, 64, 8, 8, 4>;
};
template <>
struct ConvTile<float, 32> {
  using Tile = cuda::Tile<float, 32, 32, 8, 4, 4>;
};
template <int kSide>
struct ConvTile<double, kSide> {
  using Tile = cuda::Tile<double, kSide, kSide, 8, 4, 4>;
};

template <class In, class T, int kSide>
struct ConvState {
  using Tile = typename ConvTile<T, kSide>::Tile;
  typename Tile::State tile;
  T total[Tile::kThreadRows][Tile::kThreadColumns];
  const In *left, *right;  // this thread's features at position 0; null beyond the last feature
  T feature_sum, feature_total;
};

struct ConvNoState {};

// Feature f of a group, from the position of its patch on.
KRONFAC_DEVICE int64_t conv_feature(const ConvCovariance& p, int64_t f) {
  const int64_t x = f % p.feature_kernel[2], rest = f / p.feature_kernel[2];
  const int64_t y = rest % p.feature_kernel[1], more = rest / p.feature_kernel[1];
  return more / p.feature_kernel[0] * p.channel + more % p.feature_kernel[0] * p.offset[0] + y * p.offset[1] +
         x * p.offset[2];
}

// Position k of a box.
KRONFAC_DEVICE int64_t conv_position(const ConvCovariance& p, const ConvBox& box, int64_t k) {
  const int64_t x = k % box.extent[2], rest = k / box.extent[2];
  const int64_t y = rest % box.extent[1], more = rest / box.extent[1];
  return more / box.extent[0] * p.image + more % box.extent[0] * p.position[0] + y * p.position[1] + x * p.position[2];
}

// The box that a block of a group belongs to.
KRONFAC_DEVICE int32_t conv_box(const ConvCovariance& p, int32_t block) {
  int32_t low = 0, high = p.boxes;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (p.box[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

// Sums of part `part` of a box, (rows + 1, rows).
template <class T>
KRONFAC_DEVICE T* conv_sums(const ConvCovariance& p, int64_t group, const ConvBox& box, int64_t part) {
  return static_cast<T*>(p.sums) + (group * p.parts + box.first_part + part) * p.unit();
}

// What a block of threads forms: one tile of one box over one part of its positions.
struct ConvPlace {
  const ConvBox* box;
  int64_t group, row0, column0, first;
  int32_t part, length;
  bool feature_sums;
};
KRONFAC_DEVICE ConvPlace conv_place(const ConvCovariance& p, int32_t number, int32_t side) {
  ConvPlace place;
  place.group = number / p.blocks;
  const int32_t in_group = number % p.blocks;
  const ConvBox& box = p.box[conv_box(p, in_group)];
  place.box = &box;
  place.part = (in_group - box.first_block) / box.tiles;
  const int32_t at = (in_group - box.first_block) % box.tiles;
  const int32_t across = static_cast<int32_t>((p.rows + side - 1) / side);
  const LowerTile tile = box.symmetric ? lower_tile(at) : LowerTile{at / across, at % across};
  place.row0 = int64_t{tile.row} * side;
  place.column0 = int64_t{tile.column} * side;
  const int64_t positions = p.images * box.extent[0] * box.extent[1] * box.extent[2];
  place.first = positions * place.part / box.parts;
  place.length = static_cast<int32_t>(positions * (place.part + 1) / box.parts - place.first);
  place.feature_sums = p.bias && box.symmetric && tile.column == 0;
  return place;
}

// Where the positions of two runs of kThreads lie: the next run's are found while the present one's are read.
template <int kThreads>
struct ConvRing {
  static_assert((kThreads & (kThreads - 1)) == 0);
  int64_t position[2 * kThreads];

  KRONFAC_DEVICE int64_t at(int k) const { return position[k & (2 * kThreads - 1)]; }
  // Each thread finds its position of a run.
  KRONFAC_DEVICE void find(const ConvCovariance& p, const ConvPlace& place, int thread, int run) {
    const int k = run * kThreads + thread;
    position[k & (2 * kThreads - 1)] = k < place.length ? conv_position(p, *place.box, place.first + k) : 0;
  }
};

template <class T, int kSide>
struct ConvShared {
  using Tile = typename ConvTile<T, kSide>::Tile;
  typename Tile::Shared tile;
  ConvRing<Tile::kThreads> ring;
};

// Products on the units of float32 and float64.
template <class In, class T, int kSide, class Block>
KRONFAC_DEVICE void conv_product(Block& block, ConvShared<T, kSide>& shared, const ConvCovariance& p, int32_t number) {
  using Tile = typename ConvTile<T, kSide>::Tile;
  using State = ConvState<In, T, kSide>;
  constexpr int kSteps = Tile::kThreads / Tile::kDepth;  // of one run of positions
  constexpr int kFlush = 32;                             // steps whose sums are kept apart: bounds rounding errors
  static_assert(Tile::kThreads % kSide == 0 && kSteps > 1);
  const ConvPlace place = conv_place(p, number, kSide);
  const int steps = (place.length + Tile::kDepth - 1) / Tile::kDepth;

  const auto load = [&](int thread, State& state, int step) {
    KRONFAC_UNROLL
    for (int n = 0; n < Tile::kRowLoads; ++n) {
      const int k = step * Tile::kDepth + (n * Tile::kThreads + thread) / kSide;
      const int64_t position = shared.ring.at(k);
      state.tile.a[n] = k < place.length && state.left ? widened<T>(state.left[position]) : T(0);
      state.tile.b[n] = k < place.length && state.right ? widened<T>(state.right[position]) : T(0);
    }
  };
  const auto store = [&](int thread, const State& state, int half) {
    Tile::template store<kSide>(thread, false, state.tile.a, shared.tile.a[half]);
    Tile::template store<kSide>(thread, false, state.tile.b, shared.tile.b[half]);
  };
  const auto flush = [](State& state) {
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) state.total[r][c] += state.tile.sum[r][c];
    }
    state.feature_total += state.feature_sum;
    state.feature_sum = T(0);
    Tile::clear(state.tile);
  };

  block.each([&](int thread, State& state) {
    Tile::clear(state.tile);
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) state.total[r][c] = T(0);
    }
    state.feature_sum = state.feature_total = T(0);
    const int64_t i = place.row0 + thread % kSide, j = place.column0 + thread % kSide;
    const In* map = static_cast<const In*>(p.map) + place.group * p.group;
    state.left = i < p.rows ? map + place.box->left + conv_feature(p, i) : nullptr;
    state.right = j < p.rows ? map + place.box->right + conv_feature(p, j) : nullptr;
    shared.ring.find(p, place, thread, 0);
  });
  block.each([&](int thread, State& state) {
    load(thread, state, 0);
    store(thread, state, 0);
  });
  int half = 0;
  for (int step = 0; step < steps; ++step, half ^= 1) {
    const bool more = step + 1 < steps;
    block.each([&](int thread, State& state) {
      // The next run's positions, in place of the last one's, which were last read two steps ago.
      if (step % kSteps == 0) shared.ring.find(p, place, thread, step / kSteps + 1);
      if (more) load(thread, state, step + 1);
      Tile::multiply(thread, state.tile, shared.tile, half);
      if (place.feature_sums && thread < kSide) {
        KRONFAC_UNROLL
        for (int k = 0; k < Tile::kDepth; ++k) state.feature_sum += shared.tile.a[half][k][thread];
      }
      if ((step + 1) % kFlush == 0) flush(state);
      if (more) store(thread, state, half ^ 1);
    });
  }
  T* sums = conv_sums<T>(p, place.group, *place.box, place.part);
  block.each([&](int thread, State& state) {
    flush(state);
    KRONFAC_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t i = place.row0 + Tile::row(thread, r);
      KRONFAC_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int64_t j = place.column0 + Tile::column(thread, c);
        if (i < p.rows && j < p.rows && !(place.box->symmetric && j > i)) sums[i * p.rows + j] = state.total[r][c];
      }
    }
    if (place.feature_sums && thread < kSide && place.row0 + thread < p.rows) {
      sums[p.rows * p.rows + place.row0 + thread] = state.feature_total;
    }
  });
}

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
  for (int64_t part = 0; part < box.parts; ++part) sum += sums[part * unit];
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
      if (thread < count) shared.boxes[thread] = right < left ? conv_pair(p, right, left) : conv_pair(p, left, right);
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
      for (int r = 0; r < kSide && row0 + r < p.rows; ++r) {
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
