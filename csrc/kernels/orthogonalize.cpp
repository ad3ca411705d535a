#include "kernels/orthogonalize.h"

#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Rows handled together: one load of w then serves this many rows. Eight accumulators also hide the latency of the
// additions.
constexpr int kRows = 8;

template <class T, int Rows>
void project_rows(const T* v, int64_t stride, int64_t n, const T* w, double* c) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> sum[Rows] = {};
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const Vector<T> x = load(w + j);
    for (int r = 0; r < Rows; ++r) sum[r] += load(v + r * stride + j) * x;
  }
  for (int r = 0; r < Rows; ++r) {
    double total = lane_sum<T>(sum[r]);
    for (int64_t t = j; t < n; ++t) total += static_cast<double>(v[r * stride + t]) * static_cast<double>(w[t]);
    c[r] += total;
  }
}

template <class T, int Rows>
void subtract_rows(const T* v, int64_t stride, int64_t n, const T* c, T* w) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    Vector<T> x = load(w + j);
    for (int r = 0; r < Rows; ++r) x -= c[r] * load(v + r * stride + j);
    store(w + j, x);
  }
  for (; j < n; ++j) {
    T x = w[j];
    for (int r = 0; r < Rows; ++r) x -= c[r] * v[r * stride + j];
    w[j] = x;
  }
}

template <class T>
void project(const T* v, int64_t stride, int64_t m, int64_t n, const T* w, double* c) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) project_rows<T, kRows>(v + i * stride, stride, n, w, c + i);
  for (; i < m; ++i) project_rows<T, 1>(v + i * stride, stride, n, w, c + i);
}

template <class T>
void subtract(const T* v, int64_t stride, int64_t m, int64_t n, const T* c, T* w) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) subtract_rows<T, kRows>(v + i * stride, stride, n, c + i, w);
  for (; i < m; ++i) subtract_rows<T, 1>(v + i * stride, stride, n, c + i, w);
}

}  // namespace

const OrthogonalizeKernels<float> orthogonalize_f32{.project = project<float>, .subtract = subtract<float>};
const OrthogonalizeKernels<double> orthogonalize_f64{.project = project<double>, .subtract = subtract<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
