#include "kernels/peak.h"

#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Enough independent multiply-adds for two units of five cycles latency; with a and b they fit into 16 registers.
constexpr int kChains = 12;
// Loads in flight per iteration of the memory loops.
constexpr int kStreams = 8;

template <class T>
int64_t multiply_add(int64_t repeats, T* state) {
  constexpr int64_t lanes = kLanes<T>;
  // The factor and the summand come from memory, so that the compiler cannot see where the iteration converges: to
  // b / (1 - a), far from overflow and from the slow subnormal numbers.
  const Vector<T> a = load(state + kChains * lanes), b = load(state + (kChains + 1) * lanes);
  Vector<T> x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = load(state + i * lanes);
  for (int64_t r = 0; r < repeats; ++r) {
    for (int i = 0; i < kChains; ++i) x[i] = a * x[i] + b;
  }
  for (int i = 0; i < kChains; ++i) store(state + i * lanes, x[i]);
  return repeats * kChains * lanes * 2;
}

template <class T>
void copy(const T* from, T* to, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + kStreams * lanes <= n; j += kStreams * lanes) {
    Vector<T> x[kStreams];
    for (int s = 0; s < kStreams; ++s) x[s] = load(from + j + s * lanes);
    for (int s = 0; s < kStreams; ++s) store(to + j + s * lanes, x[s]);
  }
  for (; j < n; ++j) to[j] = from[j];
}

template <class T>
T sum(const T* from, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> x[kStreams] = {};
  int64_t j = 0;
  for (; j + kStreams * lanes <= n; j += kStreams * lanes) {
    for (int s = 0; s < kStreams; ++s) x[s] += load(from + j + s * lanes);
  }
  double total = 0;
  for (int s = 0; s < kStreams; ++s) total += lane_sum<T>(x[s]);
  for (; j < n; ++j) total += static_cast<double>(from[j]);
  return static_cast<T>(total);
}

}  // namespace

const PeakKernels<float> peak_f32{.multiply_add = multiply_add<float>,
                                  .state_size = (kChains + 2) * kLanes<float>,
                                  .copy = copy<float>,
                                  .sum = sum<float>};
const PeakKernels<double> peak_f64{.multiply_add = multiply_add<double>,
                                   .state_size = (kChains + 2) * kLanes<double>,
                                   .copy = copy<double>,
                                   .sum = sum<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
