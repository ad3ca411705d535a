#include "kernels/covariance_flat.h"

#include "kernels/symmetric_update.h"
#include "kernels/symmetric_write.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Panels of all rows lie in blocks of kc rows, one after another: every block is packed as for any product.
template <class T>
int64_t packed(int64_t nk, int64_t d) {
  return nk * round_up(d, blocks_of<T>().nr);
}

template <class T>
void pack(const CovarianceInput& input, int64_t nk, int64_t d, int64_t col0, int64_t col1, T* panels) {
  constexpr Blocks block = blocks_of<T>();
  for (int64_t k = 0; k < nk; k += block.kc) {
    const int64_t kc = smaller(block.kc, nk - k);
    pack_with_ones<T>(input.x, input.features, k, kc, col0, col1 - col0,
                      panels + k * round_up(d, block.nr) + col0 * kc, [](T x) { return x; });
  }
}

template <class T>
void rows(const T* panels, int64_t nk, int64_t d, int64_t row0, int64_t row1, T decay, T scale, T* out,
          int64_t row_stride, int64_t col_stride) {
  constexpr Blocks block = blocks_of<T>();
  constexpr int64_t width = block.nr;
  const Merge<T> merge(decay, scale, out, row_stride, col_stride);
  alignas(panel_alignment) T sums[width * width] = {};
  const int64_t panel_columns = round_up(d, width);
  for (int64_t i = row0; i < row1; i += width) {
    const int64_t height = smaller(width, row1 - i);
    for (int64_t j = 0; j <= i; j += width) {
      for (int64_t k = 0; k < nk; k += block.kc) {
        const int64_t kc = smaller(block.kc, nk - k);
        const T* base = panels + k * panel_columns;
        for (int64_t r = 0; r < height; r += block.mr) {
          const int64_t columns = smaller(i + r + block.mr, row1) - j;
          update_tile(1 + (columns - 1) / kLanes<T>, k == 0, kc, base + i * kc + r, base + j * kc, sums + r * width,
                      width);
        }
      }
      write_block<T>(merge, i, i + height, j, smaller(i + height, j + width),
                     [&](int64_t r, int64_t c) { return load(sums + (r - i) * width + (c - j)); });
    }
  }
}

// Above this the sums of a panel of rows cost less to write and read again than the work that the result is held up by.
constexpr int64_t kMostRows = 512;

}  // namespace

const CovarianceFlat<float> covariance_flat_f32{
    .most_rows = kMostRows, .packed = packed<float>, .pack = pack<float>, .rows = rows<float>};
const CovarianceFlat<double> covariance_flat_f64{
    .most_rows = kMostRows, .packed = packed<double>, .pack = pack<double>, .rows = rows<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
