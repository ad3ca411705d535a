#include "kernels/precondition.h"

#include "kernels/elements.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Partial sums of an inner product: independent, so that the loop vectorises without reordering a single sum.
constexpr int kPartial = 16;

struct Sum {
  double part[kPartial] = {};
  double total() const {
    double sum = 0;
    for (int i = 0; i < kPartial; ++i) sum += part[i];
    return sum;
  }
};

template <class T, class S>
void add_products(int64_t n, const T* p, const S* g, int64_t stride, Sum& sum) {
  int64_t j = 0;
  if (stride == 1) {
    for (; j + kPartial <= n; j += kPartial) {
      for (int l = 0; l < kPartial; ++l) sum.part[l] += static_cast<double>(p[j + l]) * convert<double>(g[j + l]);
    }
  }
  for (; j < n; ++j) sum.part[j % kPartial] += static_cast<double>(p[j]) * convert<double>(g[j * stride]);
}

template <class T>
double dot(int64_t rows, int64_t columns, const T* p, int64_t ldp, const Matrix& g) {
  Sum sum;
  visit(g.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    const S* data = static_cast<const S*>(g.data);
    for (int64_t i = 0; i < rows; ++i) add_products(columns, p + i * ldp, data + i * g.row_stride, g.col_stride, sum);
  });
  return sum.total();
}

static inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

static inline Bf16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

static inline F16 to_f16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Adding 0.5, whose last place is 2^-24, rounds to a multiple of the smallest subnormal.
  const uint32_t subnormal = bits_of(bits_to_float(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
}

template <class T>
void round_to(int64_t rows, int64_t columns, const T* p, int64_t ldp, Element type, void* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = p + i * ldp;
    if (type == Element::bf16) {
      Bf16* target = static_cast<Bf16*>(out) + i * ldo;
      for (int64_t j = 0; j < columns; ++j) target[j] = to_bf16(static_cast<float>(row[j]));
    } else {
      F16* target = static_cast<F16*>(out) + i * ldo;
      for (int64_t j = 0; j < columns; ++j) target[j] = to_f16(static_cast<float>(row[j]));
    }
  }
}

template <class T>
double divide(int64_t rows, int64_t columns, T* t, int64_t ldt, const T* e, int64_t row_stride, int64_t col_stride,
              T damping) {
  Sum sum;
  for (int64_t i = 0; i < rows; ++i) {
    T* row = t + i * ldt;
    const T* spectrum = e + i * row_stride;
    int64_t j = 0;
    if (col_stride == 1) {
      for (; j + kPartial <= columns; j += kPartial) {
        for (int l = 0; l < kPartial; ++l) {
          const T before = row[j + l], after = before / (spectrum[j + l] + damping);
          row[j + l] = after;
          sum.part[l] += static_cast<double>(before) * static_cast<double>(after);
        }
      }
    }
    for (; j < columns; ++j) {
      const T before = row[j], after = before / (spectrum[j * col_stride] + damping);
      row[j] = after;
      sum.part[j % kPartial] += static_cast<double>(before) * static_cast<double>(after);
    }
  }
  return sum.total();
}

}  // namespace

const PreconditionKernels<float> precondition_f32{.dot = dot<float>, .round = round_to<float>, .divide = divide<float>};
const PreconditionKernels<double> precondition_f64{
    .dot = dot<double>, .round = round_to<double>, .divide = divide<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
