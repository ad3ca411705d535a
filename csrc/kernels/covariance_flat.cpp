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
    pack_with_ones<T>(input.x, input.features, k, kc, col0, col1 - col0, panels + k * round_up(d, block.nr) + col0 * kc,
                      [](T x) { return x; });
  }
}

// The block of the result whose first entry is (i, j), and its mirror image.
template <class T, Write write>
void block(const Merge<T, write>& merge, const T* panels, int64_t nk, int64_t d, int64_t i, int64_t row1, int64_t j,
           T* sums) {
  constexpr Blocks size = blocks_of<T>();
  constexpr int64_t width = size.nr;
  // Rows that are formed and written in one go: whole squares of vectors, and few enough stores that they drain while
  // the next rows are formed.
  constexpr int64_t strip = kLanes<T> > size.mr ? kLanes<T> : size.mr;
  const int64_t height = smaller(width, row1 - i), panel_columns = round_up(d, width);
  for (int64_t k = 0; k < nk; k += size.kc) {
    const int64_t kc = smaller(size.kc, nk - k);
    const bool last = k + kc == nk;
    const T* base = panels + k * panel_columns;
    for (int64_t s = 0; s < height; s += strip) {
      const int64_t end = smaller(height, s + strip), columns = smaller(i + end, j + width) - j;
      for (int64_t r = s; r < end; r += size.mr) {
        const int64_t needed = smaller(i + r + size.mr, row1) - j;
        update_tile(1 + (needed - 1) / kLanes<T>, k == 0, kc, base + i * kc + r, base + j * kc, sums + r * width,
                    width);
      }
      if (last) {
        write_block(merge, i + s, i + end, j, j + columns,
                    [=](int64_t r, int64_t c) { return load(sums + (r - i) * width + (c - j)); });
      }
    }
  }
}

template <class T, Write write>
void rows(const Merge<T, write>& merge, const T* panels, int64_t nk, int64_t d, int64_t row0, int64_t row1) {
  constexpr int64_t width = blocks_of<T>().nr;
  // A panel that lies in an outer cache is used for so many blocks at a time, and their mirror images are neighbours in
  // the rows of the result; the panels of these rows stay in L2.
  constexpr int64_t group = 8 * width;
  alignas(panel_alignment) T sums[width * width] = {};
  for (int64_t i0 = row0; i0 < row1; i0 += group) {
    const int64_t i1 = smaller(row1, i0 + group);
    for (int64_t j = 0; j < i1; j += width) {
      for (int64_t i = larger(i0, j); i < i1; i += width) block(merge, panels, nk, d, i, row1, j, sums);
    }
  }
}

template <class T>
void rows(const T* panels, int64_t nk, int64_t d, int64_t row0, int64_t row1, T decay, T scale, T* out,
          int64_t row_stride, int64_t col_stride) {
  with_merge(d, decay, scale, out, row_stride, col_stride,
             [=](const auto& merge) { rows(merge, panels, nk, d, row0, row1); });
}

// Above this the sums of a panel of rows cost less to write and read again than the work that the result is held up by.
constexpr int64_t kMostRows = 512;
// Matrix units (symmetric_split.h) make up for that pass earlier.
#if defined(__AMX_BF16__)
constexpr int64_t kMostFloatRows = 384, kMostBfloatRows = 192;
#else
constexpr int64_t kMostFloatRows = kMostRows, kMostBfloatRows = kMostRows;
#endif

}  // namespace

const CovarianceFlat<float> covariance_flat_f32{.most_rows = kMostFloatRows,
                                                .most_bfloat_rows = kMostBfloatRows,
                                                .packed = packed<float>,
                                                .pack = pack<float>,
                                                .rows = rows<float>};
const CovarianceFlat<double> covariance_flat_f64{.most_rows = kMostRows,
                                                 .most_bfloat_rows = kMostRows,
                                                 .packed = packed<double>,
                                                 .pack = pack<double>,
                                                 .rows = rows<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
