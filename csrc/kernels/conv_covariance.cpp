#include "kernels/conv_covariance.h"

#include "kernels/symmetric_update.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// One feature: where its entry for output position 0 lies, and which positions of the last axis see the map rather than
// padding.
struct Feature {
  int64_t offset;       // from the start of an image, padding counted; may be negative
  int64_t shift[2];     // position on axes 0 and 1 under output 0
  int64_t first, last;  // [first, last) of the outputs of axis 2
  bool one;             // the column of ones
};

constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

Feature describe(const ConvInput& input, int64_t j) {
  Feature feature{};
  feature.one = j >= input.features();
  int64_t index[3], rest = j;
  for (int axis = 2; axis >= 0; --axis) {
    index[axis] = rest % input.kernel[axis] * input.dilation[axis] - input.low[axis];
    rest /= input.kernel[axis];
  }
  feature.offset = rest * input.channel_stride;
  for (int axis = 0; axis < 3; ++axis) feature.offset += index[axis] * input.axis_stride[axis];
  feature.shift[0] = index[0];
  feature.shift[1] = index[1];
  // Outputs x with 0 <= x * step + index[2] < size.
  const int64_t step = input.step[2], before = -index[2], inside = input.size[2] - index[2];
  feature.first = clamp(before <= 0 ? 0 : (before + step - 1) / step, 0, input.out[2]);
  feature.last = clamp(inside <= 0 ? 0 : (inside + step - 1) / step, feature.first, input.out[2]);
  return feature;
}

// Lanes of one panel for the outputs [x0, x1) of one row of outputs; `row` is the panel row of x0.
template <class T, class S>
void pack_row(const Feature* features, int64_t lanes, const ConvInput& input, const S* image, int64_t z, int64_t y,
              int64_t x0, int64_t x1, T* row) {
  constexpr int64_t width = blocks_of<T>().nr;
  const int64_t step = input.step[2] * input.axis_stride[2],
                row_offset = z * input.axis_stride[0] + y * input.axis_stride[1];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const Feature& feature = features[lane];
    T* out = row + lane;
    if (feature.one) {
      for (int64_t x = x0; x < x1; ++x) out[(x - x0) * width] = T(1);
      continue;
    }
    const int64_t in_z = z + feature.shift[0], in_y = y + feature.shift[1];
    const bool inside = in_z >= 0 && in_z < input.size[0] && in_y >= 0 && in_y < input.size[1];
    const int64_t first = inside ? clamp(feature.first, x0, x1) : x1,
                  last = inside ? clamp(feature.last, first, x1) : x1;
    for (int64_t x = x0; x < first; ++x) out[(x - x0) * width] = T(0);
    const int64_t start = row_offset + feature.offset;
    if (step == 1) {
      for (int64_t x = first; x < last; ++x) out[(x - x0) * width] = convert<T>(image[start + x]);
    } else {
      for (int64_t x = first; x < last; ++x) out[(x - x0) * width] = convert<T>(image[start + x * step]);
    }
    for (int64_t x = last; x < x1; ++x) out[(x - x0) * width] = T(0);
  }
  if (lanes < width) {
    for (int64_t x = x0; x < x1; ++x) {
      for (int64_t lane = lanes; lane < width; ++lane) row[(x - x0) * width + lane] = T(0);
    }
  }
}

template <class T>
void pack(const void* context, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels) {
  constexpr int64_t width = blocks_of<T>().nr;
  const auto& input = *static_cast<const ConvInput*>(context);
  visit(input.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    for (int64_t j = 0; j < nj; j += width) {
      Feature features[width];
      const int64_t lanes = smaller(width, nj - j);
      for (int64_t lane = 0; lane < lanes; ++lane) features[lane] = describe(input, j0 + j + lane);
      T* panel = panels + j * nk;
      int64_t x0 = k0 % input.out[2], y = k0 / input.out[2] % input.out[1],
              z = k0 / (input.out[2] * input.out[1]) % input.out[0];
      int64_t n = k0 / (input.out[2] * input.out[1] * input.out[0]);
      for (int64_t k = 0; k < nk;) {
        const int64_t x1 = smaller(input.out[2], x0 + nk - k);
        pack_row(features, lanes, input, static_cast<const S*>(input.data) + n * input.batch_stride, z * input.step[0],
                 y * input.step[1], x0, x1, panel + k * width);
        k += x1 - x0;
        x0 = 0;
        if (++y == input.out[1]) {
          y = 0;
          if (++z == input.out[0]) {
            z = 0;
            ++n;
          }
        }
      }
    }
  });
}

}  // namespace

void conv_covariance_f32(const ConvInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, float* sum,
                         int64_t ld, void* scratch) {
  update<float>({pack<float>, &input}, k0, k1, row0, row1, sum, ld, scratch);
}
void conv_covariance_f64(const ConvInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, double* sum,
                         int64_t ld, void* scratch) {
  update<double>({pack<double>, &input}, k0, k1, row0, row1, sum, ld, scratch);
}

}  // namespace kronfac::kernels::KRONFAC_ISA
