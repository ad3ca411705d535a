// The patch covariance by products of the map with itself shifted, after a plan.
#pragma once

#include "cpu/conv_covariance_plan.h"
#include "cpu/symmetric.h"

namespace kronfac::cpu {

// out := decay * out + scale * sum over the patches, as the direct form does. Group g starts group_stride bytes after
// the one before; positions counts the patches, whose last feature is a one with `bias`.
template <class T>
void conv_covariance_shift(const SymmetricOutput& out, const kernels::ConvInput& input, int64_t images,
                           int64_t group_stride, int64_t positions, bool bias, double decay, double scale,
                           const ShiftPlan& plan);

extern template void conv_covariance_shift<float>(const SymmetricOutput&, const kernels::ConvInput&, int64_t, int64_t,
                                                  int64_t, bool, double, double, const ShiftPlan&);
extern template void conv_covariance_shift<double>(const SymmetricOutput&, const kernels::ConvInput&, int64_t, int64_t,
                                                   int64_t, bool, double, double, const ShiftPlan&);

}  // namespace kronfac::cpu
