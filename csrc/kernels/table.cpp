#include "kernels/table.h"

#define KRONFAC_STRING_(a) #a
#define KRONFAC_STRING(a) KRONFAC_STRING_(a)

namespace kronfac::kernels::KRONFAC_ISA {

extern const Table table;
const Table table{
    .name = KRONFAC_STRING(KRONFAC_ISA),
    .blocks_f32 = kBlocksF32,
    .blocks_f64 = kBlocksF64,
    .gemm_f32 = gemm_f32,
    .gemm_f64 = gemm_f64,
    .gemm_scratch_f32 = gemm_scratch_f32,
    .gemm_scratch_f64 = gemm_scratch_f64,
    .gemm_split_pays = KRONFAC_ISA::gemm_split_pays,
    .symmetric_f32 = &KRONFAC_ISA::symmetric_f32,
    .symmetric_f64 = &KRONFAC_ISA::symmetric_f64,
    .covariance_f32 = KRONFAC_ISA::covariance_f32,
    .covariance_f64 = KRONFAC_ISA::covariance_f64,
    .covariance_narrow_f32 = KRONFAC_ISA::covariance_narrow_f32,
    .covariance_narrow_f64 = KRONFAC_ISA::covariance_narrow_f64,
    .covariance_flat_f32 = &KRONFAC_ISA::covariance_flat_f32,
    .covariance_flat_f64 = &KRONFAC_ISA::covariance_flat_f64,
    .conv_covariance_f32 = KRONFAC_ISA::conv_covariance_f32,
    .conv_covariance_f64 = KRONFAC_ISA::conv_covariance_f64,
    .shift_f32 = &KRONFAC_ISA::shift_f32,
    .shift_f64 = &KRONFAC_ISA::shift_f64,
    .second_moment_f32 = &KRONFAC_ISA::second_moment_f32,
    .second_moment_f64 = &KRONFAC_ISA::second_moment_f64,
    .damped_inverse_f32 = &KRONFAC_ISA::damped_inverse_f32,
    .damped_inverse_f64 = &KRONFAC_ISA::damped_inverse_f64,
    .batch_eigh_f32 = &KRONFAC_ISA::batch_eigh_f32,
    .batch_eigh_f64 = &KRONFAC_ISA::batch_eigh_f64,
    .precondition_f32 = &KRONFAC_ISA::precondition_f32,
    .precondition_f64 = &KRONFAC_ISA::precondition_f64,
    .orthogonalize_f32 = &KRONFAC_ISA::orthogonalize_f32,
    .orthogonalize_f64 = &KRONFAC_ISA::orthogonalize_f64,
    .peak_f32 = &KRONFAC_ISA::peak_f32,
    .peak_f64 = &KRONFAC_ISA::peak_f64,
};

}  // namespace kronfac::kernels::KRONFAC_ISA
