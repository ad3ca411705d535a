#include "kernels/covariance.h"

#include "kernels/symmetric_update.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

template <class T>
void pack(const void* context, int64_t k0, int64_t nk, int64_t j0, int64_t nj, T* panels) {
  const auto& input = *static_cast<const CovarianceInput*>(context);
  pack_with_ones<T>(input.x, input.features, k0, nk, j0, nj, panels, [](T x) { return x; });
}

template <class T>
Source<T> source_of(const CovarianceInput& input) {
  return {pack<T>, &input, input.x.type == Element::bf16, input.x, input.features};
}

}  // namespace

void covariance_f32(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, float* sum,
                    int64_t ld, void* scratch) {
  update<float>(source_of<float>(input), k0, k1, row0, row1, sum, ld, scratch);
}
void covariance_f64(const CovarianceInput& input, int64_t k0, int64_t k1, int64_t row0, int64_t row1, double* sum,
                    int64_t ld, void* scratch) {
  update<double>(source_of<double>(input), k0, k1, row0, row1, sum, ld, scratch);
}

}  // namespace kronfac::kernels::KRONFAC_ISA
