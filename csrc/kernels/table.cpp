#include "kernels/table.h"

#define KRONFAC_JOIN_(a, b) a##b
#define KRONFAC_JOIN(a, b) KRONFAC_JOIN_(a, b)
#define KRONFAC_STRING_(a) #a
#define KRONFAC_STRING(a) KRONFAC_STRING_(a)

namespace kronfac::kernels::KRONFAC_ISA {

extern const Table table;
const Table table{
    .name = KRONFAC_STRING(KRONFAC_ISA),
    .blocks_f32 = blocks::KRONFAC_JOIN(KRONFAC_ISA, _f32),
    .blocks_f64 = blocks::KRONFAC_JOIN(KRONFAC_ISA, _f64),
    .gemm_f32 = gemm_f32,
    .gemm_f64 = gemm_f64,
    .gemm_scratch_f32 = multiply_scratch<float>,
    .gemm_scratch_f64 = multiply_scratch<double>,
};

}  // namespace kronfac::kernels::KRONFAC_ISA
