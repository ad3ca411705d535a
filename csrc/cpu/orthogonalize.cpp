// w <- w - V^T (V w), several times: classical Gram-Schmidt against stored rows.
//
// A pass is a projection and a subtraction, and each needs all of the other's result, so done one by one they read V
// from memory twice. Here the columns are worked through in blocks that stay in the cache: a sweep subtracts the
// previous coefficients from a block of w and at once projects the result for the next pass. V is read passes + 1 times
// instead of 2 * passes.
#include <limits>
#include <vector>

#include "common/arguments.h"
#include "cpu/parallel.h"
#include "cpu/typed.h"

namespace kronfac::cpu {
namespace {

// A block of V takes half a megabyte, so that it is still in a second-level cache when it is read again.
constexpr int64_t kBlockBytes = int64_t{1} << 19;
constexpr int64_t kNarrowest = 256, kWidest = 8192, kColumnMultiple = 64;
// Parts with sums of their own, added in order afterwards: the same for any number of threads.
constexpr int64_t kParts = 64;

int64_t block_columns(int64_t m, int64_t element_bytes) {
  const int64_t fitting = kBlockBytes / std::max<int64_t>(1, m * element_bytes) / kColumnMultiple * kColumnMultiple;
  return std::clamp(fitting, kNarrowest, kWidest);
}

template <class T>
void orthogonalize(const Tensor& w, const Tensor& basis, int64_t passes, T* total) {
  const Kernels<T> kernels;
  const int64_t m = basis.size(0), n = w.size(0);
  const int64_t row_stride = basis.stride(0), column_stride = basis.stride(1), w_stride = w.stride(0);
  const T* v = basis.const_data_ptr<T>();
  T* target = w.mutable_data_ptr<T>();
  const int64_t size = static_cast<int64_t>(sizeof(T));
  const int64_t width = block_columns(m, size);
  const int64_t part_length = (n + kParts * width - 1) / (kParts * width) * width;
  const int64_t parts = (n + part_length - 1) / part_length;
  const bool copied = w_stride != 1, packed = column_stride != 1;

  const Scratch vector(copied ? n * size : 0);
  const int64_t packed_bytes = packed ? Scratch::rounded(m * width * size) : 0;
  const Scratch panels(packed_bytes * parts);
  std::vector<double> partial(static_cast<size_t>(parts * m));
  std::vector<T> coefficients(static_cast<size_t>(m));
  T* x = copied ? vector.at<T>() : target;
  if (copied) {
    for (int64_t j = 0; j < n; ++j) x[j] = target[j * w_stride];
  }
  std::fill(total, total + m, T(0));
  std::vector<double> sums(static_cast<size_t>(m));

  for (int64_t sweep = 0; sweep <= passes; ++sweep) {
    const bool subtract = sweep > 0, project = sweep < passes;
    std::fill(partial.begin(), partial.end(), 0.0);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        double* sum = partial.data() + part * m;
        for (int64_t j = part * part_length; j < std::min(n, (part + 1) * part_length); j += width) {
          const int64_t columns = std::min(width, n - j);
          const T* block = v + j * column_stride;
          int64_t stride = row_stride;
          if (packed) {
            // One panel for each range of parts that runs at a time; `begin` tells the ranges apart.
            T* panel = panels.at<T>(begin * packed_bytes);
            for (int64_t c = 0; c < columns; ++c) {
              for (int64_t i = 0; i < m; ++i) panel[i * width + c] = block[i * row_stride + c * column_stride];
            }
            block = panel;
            stride = width;
          }
          if (subtract) kernels.orthogonalize.subtract(block, stride, m, columns, coefficients.data(), x + j);
          if (project) kernels.orthogonalize.project(block, stride, m, columns, x + j, sum);
        }
      }
    });
    if (!project) break;
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[static_cast<size_t>(part * m + i)];
      coefficients[static_cast<size_t>(i)] = static_cast<T>(sum);
      sums[static_cast<size_t>(i)] += sum;
    }
  }
  for (int64_t i = 0; i < m; ++i) total[i] = static_cast<T>(sums[static_cast<size_t>(i)]);
  if (copied) {
    for (int64_t j = 0; j < n; ++j) target[j * w_stride] = x[j];
  }
}

Tensor orthogonalize_(Tensor w, Tensor basis, int64_t passes) {
  check_orthogonalize(w, basis, passes);
  const int64_t m = basis.size(0), n = w.size(0);
  const bool wide = w.scalar_type() == ScalarType::Double;
  Tensor coefficients = empty_vector(m, w.scalar_type());
  if (m == 0 || n == 0) return torch::stable::zero_(coefficients);
  if (wide) {
    orthogonalize<double>(w, basis, passes, coefficients.mutable_data_ptr<double>());
  } else {
    orthogonalize<float>(w, basis, passes, coefficients.mutable_data_ptr<float>());
  }
  return coefficients;
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "orthogonalize_", TORCH_BOX(&kronfac::cpu::orthogonalize_));
}
