// out := decay * out + scale * sum over the patches p of a map of [p 1]^T [p 1], per group of channels, on the GPU and
// without forming the patches. Torch-free: the glue fills in the structures, conv_covariance_plan.h the tables.
//
// Shifted form. The block of kernel offsets i and j is the sum over output positions p of a[p + i] a[p + j]^T. With
// u = p + i it depends on the pair through j - i alone (and, for strides, the phase of i), up to the first and last u.
// So for each difference the range of u is cut into boxes wherever a pair's range begins or ends, one product of
// channels x channels is formed for each box, and a block of the result is the sum of the boxes that make up its own
// range: nothing is ever subtracted. Boxes of positive differences suffice, the others are transposes. For a kernel of
// 3 x 3 and padding 1: 29 boxes, 13 of them about as large as the map, 16 strips and corners.
//
// Direct form. One box of all output positions, whose features are all of a patch, read from a map with its zeros
// around it: for few channels, or kernels with many offsets and few coincidences.
//
// Either way a product is C(i, j) = sum over u of map[left + at(u) + feature(i)] * map[right + at(u) + feature(j)], and
// all boxes, tiles and parts of long sums are blocks of threads of one launch. Launches: a table, the map in another
// layout (unless its channels are neighbours already), products, sums of parts (where there are any), the result, its
// last row.
//
// Operations (multiply-adds) and bytes. (128, 64, 32, 32), 3 x 3, padding 1, float32: unfold + matmul multiply 576 x
// 576 at 131072 positions, 43.5e9, and move 302 MB four times (unfold writes, transposing reads and writes, matmul
// reads); here 13 tiles of 64 x 64 at about 123000 positions are 6.5e9, and the map of 34 MB is read, written and read
// again: 0.2 ms at the 33e12/s of an H200's float32 units, 20 us of bandwidth. In bfloat16 tiles of 64 x 64 are bound
// by shared memory, 24 KiB for 32 positions: 192 cycles, 43 us in all on 132 multiprocessors, and 10 us of bandwidth.
// ResNet-50 at batch 64: the 3 x 3 layers of stride 1 are maps of 51, 26, 13, 6 MB with 64 to 512 channels, hence about
// 10.4e9 multiply-adds each (66e9 by unfold), and a result of up to 85 MB.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

// One range of positions of one difference.
struct ConvBox {
  int64_t left, right;  // of the first position, in elements from the start of a group
  int64_t extent[3];
  int32_t first_block, first_part;  // of one group
  int32_t parts, tiles;
  int32_t symmetric;  // difference 0: the lower triangle is formed, and sums of the left features
  int32_t unused;
};

// A pair of offsets along one axis: the axis' term it belongs to, and which of the term's ranges it is the sum of.
struct ConvPair {
  int32_t term;
  int16_t first, last;
};

struct ConvCovariance {
  Element type;
  bool tensor, aligned;  // products on tensor cores; features side by side at multiples of 16 bytes
  int32_t side;          // of the square tiles of products: 32 or 64, on tensor cores 64 or 128
  const void* map;
  // Strides of the map in elements: of groups, images, positions of boxes, channels, and offsets within a feature.
  int64_t group, image, position[3], channel, offset[3];
  int64_t feature_kernel[3];  // offsets that a feature number counts, the last axis fastest
  int64_t rows;               // features of a product
  int64_t images, groups;
  // Tables in device memory.
  const ConvBox* box;
  const ConvPair* pair[3];     // [left offset * kernel + right offset]
  const int32_t* ranges[3];    // of each term of an axis
  const int32_t* combination;  // the first box of a combination of axis terms, -1 where its transpose is formed
  int32_t boxes, terms[3];
  int32_t blocks, parts;  // of one group, all boxes together
  int32_t reduced;        // whether any box has several parts
  void* sums;             // (groups, parts, rows + 1, rows) of out's type; the last row: sums of features
  // The result: blocks of `rows` features for each pair of offsets.
  int32_t kernel[3];
  bool bias;
  int64_t positions;
  double decay, scale;  // decay == 0 does not read out
  void* out;
  int64_t out_group, out_row, out_column;

  KRONFAC_BOTH int64_t unit() const { return (rows + 1) * rows; }
  KRONFAC_BOTH int32_t offsets() const { return kernel[0] * kernel[1] * kernel[2]; }
  KRONFAC_BOTH int64_t d() const { return rows * offsets() + (bias ? 1 : 0); }
};

// The map in another layout, of the same type.
struct ConvLayout {
  const void* x;
  void* target;
  int64_t images, channels, image, channel, axis[3];
  int64_t size[3];
  int64_t row;                // of the shifted form: from one position's channels to the next one's, at least channels
  int64_t low[3], padded[3];  // of the direct form: zeros before the map, sizes with all zeros
};

// Tables travel to the device as arguments of a kernel, 4 KiB at most: a copy from the host's memory would wait for it.
inline constexpr int kConvUploadWords = 480;
struct ConvUpload {
  uint64_t* target;
  int32_t count;
  uint64_t word[kConvUploadWords];
};

// Square blocks of channels x positions that change places, and of channels x channels that are put together.
inline constexpr int kConvTranspose = 64, kConvAssemble = 16, kConvThreads = 256;
inline constexpr int kConvOffsets = 9;  // put together at a time

inline int64_t conv_transpose_blocks(const ConvLayout& p) {
  const int64_t positions = p.size[0] * p.size[1] * p.size[2];
  return p.images * ((positions + kConvTranspose - 1) / kConvTranspose) *
         ((p.channels + kConvTranspose - 1) / kConvTranspose);
}
inline int64_t conv_pad_blocks(const ConvLayout& p) {
  return (p.images * p.channels * p.padded[0] * p.padded[1] * p.padded[2] + kConvThreads - 1) / kConvThreads;
}
inline int64_t conv_reduce_blocks(const ConvCovariance& p) {
  return (p.groups * p.boxes * p.unit() + kConvThreads - 1) / kConvThreads;
}
inline int64_t conv_assemble_blocks(const ConvCovariance& p) {
  const int64_t across = (p.rows + kConvAssemble - 1) / kConvAssemble;
  return p.groups * across * across * p.offsets();
}
inline int64_t conv_bias_blocks(const ConvCovariance& p) {
  return p.groups * ((p.d() + kConvThreads - 1) / kConvThreads);
}

void conv_upload(const ConvUpload& p, Stream stream);
// (images, channels, *size) of any strides to (images, *size, row), of each row the channels.
void conv_transpose(const ConvLayout& p, int64_t bytes, Stream stream);
// (images, channels, *size) of any strides to (images, channels, *padded).
void conv_pad(const ConvLayout& p, int64_t bytes, Stream stream);
void conv_covariance(const ConvCovariance& p, Stream stream);
// The products of conv_covariance on tensor cores.
void conv_mma_products(const ConvCovariance& p, Stream stream);

}  // namespace kronfac::cuda
