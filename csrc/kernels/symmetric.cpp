#include "kernels/symmetric.h"

#include "kernels/symmetric_update.h"
#include "kernels/symmetric_write.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Sums are written block by block, so that runs of a block's width and height reach the rows of the result and of its
// mirror image: long enough for whole cache lines and few page changes, and the sums of a block stay in L1 meanwhile.
template <class T>
constexpr int64_t kBlock = 256 / static_cast<int64_t>(sizeof(T));

template <class T, Write write>
void finish(const Merge<T, write>& merge, int64_t row0, int64_t row1, const T* sums, int64_t count, int64_t distance,
            int64_t ld) {
  const T* from = sums - row0 * ld;
  for (int64_t i = row0, end; i < row1; i = end) {
    end = smaller(row1, (i / kBlock<T> + 1) * kBlock<T>);
    for (int64_t j = 0; j < end; j += kBlock<T>) {
      const int64_t right = smaller(end, j + kBlock<T>);
      if (count == 1) {
        write_block(merge, i, end, j, right, [=](int64_t r, int64_t c) { return load(from + r * ld + c); });
      } else {
        write_block(merge, i, end, j, right, [=](int64_t r, int64_t c) {
          Vector<T> sum = load(from + r * ld + c);
          for (int64_t p = 1; p < count; ++p) sum += load(from + p * distance + r * ld + c);
          return sum;
        });
      }
    }
  }
}

template <class T>
void finish(int64_t row0, int64_t row1, T* sums, int64_t count, int64_t distance, int64_t ld, T decay, T scale, T* out,
            int64_t row_stride, int64_t col_stride) {
  with_merge(row1, decay, scale, out, row_stride, col_stride,
             [=](const auto& merge) { finish(merge, row0, row1, sums, count, distance, ld); });
}

}  // namespace

extern const SymmetricKernels<float> symmetric_f32;
extern const SymmetricKernels<double> symmetric_f64;
const SymmetricKernels<float> symmetric_f32{update_scratch<float>, finish<float>};
const SymmetricKernels<double> symmetric_f64{update_scratch<double>, finish<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
