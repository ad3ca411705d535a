// Rows of the patch covariance of a map in the sense of symmetric.h: row k of Y is the patch under output position k,
// its features ordered as channel, then kernel offset, then perhaps a one. Patches are packed straight from the map.
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace kronfac::kernels {

// A map (batch, channels, 3 spatial axes) of any strides, in elements; maps of one or two axes have leading axes of
// size 1. Output position k counts through (batch, out[0], out[1], out[2]), the last one fastest.
struct ConvInput {
  const void* data;
  Element type;
  int64_t channels;
  int64_t batch_stride, channel_stride, axis_stride[3];
  int64_t size[3], kernel[3], step[3], low[3], dilation[3], out[3];  // low: padding before the first entry

  constexpr int64_t features() const { return channels * kernel[0] * kernel[1] * kernel[2]; }
};

// Rows [row0, row1) over the output positions [k0, k1); row1 is at most features() + 1, and features() + 1 stands for
// the ones.
template <class T>
using ConvCovarianceUpdate = void (*)(const ConvInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1,
                                      T* sum, int64_t ld, void* scratch);

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
void conv_covariance_f32(const ConvInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, float* sum,
                         int64_t ld, void* scratch);
void conv_covariance_f64(const ConvInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, double* sum,
                         int64_t ld, void* scratch);
}  // namespace KRONFAC_ISA
#endif

}  // namespace kronfac::kernels
