// Patch covariance without patches, from products of a map with itself shifted.
//
// The entry of the covariance that pairs kernel offsets q and q' is a sum over outputs p of a[p + q] a[p + q']^T. With
// u = p + q it depends on q and q' through d = q' - q alone, up to which border positions u are left out. So for each d
// the positions are cut into boxes, such that every pair of offsets with that difference takes whole boxes; each box
// costs one product of channels by channels, and the entries of the covariance are sums of boxes. Boxes are only ever
// added, never taken away from a larger sum, which would lose all digits to large values at the border.
//
// A kernel here works on a chunk: some images, or a band of one, stored as panels [panel][position][lanes of one
// vector], so that a shift is an offset of both operands into the same memory and a panel of channels is read in order.
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace kronfac::kernels {

// One map (batch, channels, 3 spatial axes) of any strides, in elements.
struct ShiftInput {
  const void* data;
  Element type;
  int64_t batch_stride, channel_stride, axis_stride[3];
  int64_t size[3], step[3];  // position u of an axis stands for the entry base + u * step of the map
};

// A row of the left operand: a channel of the map, read from `base` on. Entries outside the map are zero.
struct ShiftRow {
  int64_t channel, base[3];
};

// Positions of the panels: images [image, image + images), positions [first, first + count) of each axis.
struct ShiftChunk {
  int64_t image, images, first[3], count[3];

  constexpr int64_t positions() const { return images * count[0] * count[1] * count[2]; }
};

// A box of positions within a panel: axes from outermost to innermost, strides in positions.
struct ShiftBox {
  int64_t count[4], stride[4];
};

template <class T>
struct ShiftKernels {
  int64_t lanes;  // width of a panel

  // Fills the panels of `rows` rows, ceil(rows / lanes) of them; lanes past the last row are zero.
  void (*pack)(const ShiftInput& input, const ShiftRow* rows, int64_t count, const ShiftChunk& chunk, T* panels);

  // sum += left^T right over a box; `left` and `right` point at its first position in panels that are `panel_stride`
  // elements apart. Rows [row0, row1) of the sum, which has ld = columns rounded up to lanes; row0 is a multiple of
  // lanes and `sum` points at row 0. lower: what lies wholly right of the diagonal panel need not be computed. split:
  // scratch of split_scratch bytes where long runs of positions should go to matrix units (split.h), else null.
  void (*products)(const ShiftBox& box, const T* left, int64_t row0, int64_t row1, const T* right, int64_t columns,
                   int64_t panel_stride, bool lower, T* sum, void* split);

  // Bytes for products with so many rows and columns on matrix units; 0 where there are none, or too little for them.
  int64_t (*split_scratch)(int64_t rows, int64_t columns);

  // sum[row] += the sum of left's row over a box.
  void (*sums)(const ShiftBox& box, const T* left, int64_t rows, int64_t panel_stride, T* sum);

  // total += part; part := 0.
  void (*flush)(int64_t n, T* part, T* total);

  // total += part.
  void (*add)(int64_t n, const T* part, T* total);

  // out[r * row_stride + c * col_stride] := sum over the boxes of box[r * ld + c], or += where it is not fresh.
  void (*gather)(const T* const* boxes, int64_t count, int64_t rows, int64_t columns, int64_t ld, bool fresh, T* out,
                 int64_t row_stride, int64_t col_stride);
};

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const ShiftKernels<float> shift_f32;
extern const ShiftKernels<double> shift_f64;
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
