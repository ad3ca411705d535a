// out <- decay * out + scale * sum_n (sum_t g_nt [x_nt 1]^T)^2, elementwise squares.
#include "common/arguments.h"
#include "cpu/symmetric.h"

namespace kronfac::cpu {
namespace {

// Block of the result that one task forms: sums of 192 x 768 floats, 0.6 MB, stay in a second-level cache while the
// examples pass by, and an entry is packed once for about 150 of its uses.
constexpr int64_t kRows = 192, kColumns = 768;

kernels::Examples examples_of(const Tensor& t) {
  return {{t.const_data_ptr(), element_of(t), t.stride(1), t.stride(2)}, t.size(2), t.stride(0)};
}

template <class T>
void second_moment(const Tensor& out, const Tensor& g, const Tensor& x, double decay, double scale) {
  const Kernels<T> kernels;
  const int64_t rows = out.size(0), columns = out.size(1), threads = thread_count();
  if (rows == 0 || columns == 0) return;
  const int64_t nr = kernels.blocks.nr;
  const auto up = [nr](int64_t n) { return (n + nr - 1) / nr * nr; };
  int64_t height = std::min(up(rows), up(kRows)), width = std::min(up(columns), up(kColumns));
  const auto count = [](int64_t n, int64_t part) { return (n + part - 1) / part; };
  while (count(rows, height) * count(columns, width) < threads && (height > nr || width > nr)) {
    int64_t& side = width >= height ? width : height;
    side = up((side + 1) / 2);
  }
  const int64_t across = count(columns, width);
  const int64_t scratch_bytes = Scratch::rounded(kernels.second_moment.scratch(height, width, g.size(1)));
  std::vector<int64_t> tasks(static_cast<size_t>(count(rows, height) * across));
  std::iota(tasks.begin(), tasks.end(), 0);
  const int64_t workers = std::min(threads, static_cast<int64_t>(tasks.size()));
  const Scratch scratch(scratch_bytes * workers);
  const kernels::Examples left = examples_of(g), right = examples_of(x);
  T* data = out.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t row = task / across * height, column = task % across * width;
    kernels.second_moment.block(left, right, g.size(0), g.size(1), row, std::min(rows, row + height), column,
                                std::min(columns, column + width), static_cast<T>(decay), static_cast<T>(scale), data,
                                out.stride(0), out.stride(1), scratch.at(worker * scratch_bytes));
  });
}

void second_moment_(Tensor out, Tensor g, Tensor x, bool bias, double decay, double scale) {
  check_second_moment(out, g, x, bias, decay, scale);
  g = apart_from(out, g);
  x = apart_from(out, x);
  if (out.scalar_type() == ScalarType::Double) {
    second_moment<double>(out, g, x, decay, scale);
  } else {
    second_moment<float>(out, g, x, decay, scale);
  }
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "second_moment_", TORCH_BOX(&kronfac::cpu::second_moment_));
}
