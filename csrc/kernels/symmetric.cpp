#include "kernels/symmetric.h"

#include "kernels/symmetric_update.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// The mirror image is written from blocks of kLine columns of the sums, one cache line wide, and kRun rows: what is
// read is used up at once, and what is written are runs of kRun entries along a row, long enough for the hardware to
// fetch ahead.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
constexpr int64_t kRun = 512;

template <class T>
void merge(T* out, int64_t stride, int64_t n, T decay, const T* update) {
  if (decay == T(0)) {
    for (int64_t j = 0; j < n; ++j) out[j * stride] = update[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j * stride] = decay * out[j * stride] + update[j];
  }
}

template <class T>
void finish(int64_t row0, int64_t row1, T* sums, int64_t count, int64_t distance, int64_t ld, T decay, T scale, T* out,
            int64_t row_stride, int64_t col_stride) {
  // Both triangles get the same S, so a column-major out is its own transpose.
  if (col_stride != 1 && row_stride == 1) {
    const int64_t stride = row_stride;
    row_stride = col_stride;
    col_stride = stride;
  }
  for (int64_t i = row0; i < row1; ++i) {
    T* sum = sums + (i - row0) * ld;
    for (int64_t p = 1; p < count; ++p) {
      for (int64_t j = 0; j <= i; ++j) sum[j] += sum[p * distance + j];
    }
    // Scaled here, so that both triangles then do one and the same multiply-add: a symmetric out stays symmetric.
    for (int64_t j = 0; j <= i; ++j) sum[j] *= scale;
    merge(out + i * row_stride, col_stride, i + 1, decay, sum);
  }
  T across[kLine<T>][kRun + kLine<T>];  // rows of a power of two would all fall on the same few cache sets
  for (int64_t i0 = row0; i0 < row1; i0 += kRun) {
    const int64_t rows = smaller(kRun, row1 - i0);
    for (int64_t j0 = 0; j0 < i0 + rows - 1; j0 += kLine<T>) {
      const int64_t columns = smaller(kLine<T>, i0 + rows - 1 - j0);
      const int64_t above = larger(0, j0 + 1 - i0);  // the first row with an entry below the diagonal
      for (int64_t i = above; i < rows; ++i) {
        const T* sum = sums + (i0 - row0 + i) * ld + j0;
        const int64_t n = smaller(columns, i0 + i - j0);
        for (int64_t j = 0; j < n; ++j) across[j][i] = sum[j];
      }
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t first = larger(0, j0 + j + 1 - i0);
        merge(out + (j0 + j) * row_stride + (i0 + first) * col_stride, col_stride, rows - first, decay,
              across[j] + first);
      }
    }
  }
}

}  // namespace

extern const SymmetricKernels<float> symmetric_f32;
extern const SymmetricKernels<double> symmetric_f64;
const SymmetricKernels<float> symmetric_f32{update_scratch<float>, finish<float>};
const SymmetricKernels<double> symmetric_f64{update_scratch<double>, finish<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
