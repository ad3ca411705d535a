// The kernels of one instruction set, as a table that the glue and the host module call through.
#pragma once

#include <cstdint>

#include "kernels/batch_eigh.h"
#include "kernels/blocks.h"
#include "kernels/conv_covariance.h"
#include "kernels/conv_covariance_shift.h"
#include "kernels/covariance.h"
#include "kernels/covariance_flat.h"
#include "kernels/covariance_narrow.h"
#include "kernels/damped_inverse.h"
#include "kernels/gemm.h"
#include "kernels/orthogonalize.h"
#include "kernels/peak.h"
#include "kernels/precondition.h"
#include "kernels/second_moment.h"
#include "kernels/symmetric.h"

namespace kronfac::kernels {

struct Table {
  const char* name;  // one of kTableNames
  Blocks blocks_f32, blocks_f64;

  GemmF32 gemm_f32;
  GemmF64 gemm_f64;
  GemmScratch gemm_scratch_f32, gemm_scratch_f64;
  GemmSplitPays gemm_split_pays;  // of float32

  const SymmetricKernels<float>* symmetric_f32;
  const SymmetricKernels<double>* symmetric_f64;
  CovarianceUpdate<float> covariance_f32;
  CovarianceUpdate<double> covariance_f64;
  CovarianceUpdate<float> covariance_narrow_f32;
  CovarianceUpdate<double> covariance_narrow_f64;
  const CovarianceFlat<float>* covariance_flat_f32;
  const CovarianceFlat<double>* covariance_flat_f64;
  ConvCovarianceUpdate<float> conv_covariance_f32;
  ConvCovarianceUpdate<double> conv_covariance_f64;
  const ShiftKernels<float>* shift_f32;
  const ShiftKernels<double>* shift_f64;
  const SecondMomentKernels<float>* second_moment_f32;
  const SecondMomentKernels<double>* second_moment_f64;

  const DampedInverseKernels<float>* damped_inverse_f32;
  const DampedInverseKernels<double>* damped_inverse_f64;
  const BatchEighKernels<float>* batch_eigh_f32;
  const BatchEighKernels<double>* batch_eigh_f64;
  const PreconditionKernels<float>* precondition_f32;
  const PreconditionKernels<double>* precondition_f64;
  const OrthogonalizeKernels<float>* orthogonalize_f32;
  const OrthogonalizeKernels<double>* orthogonalize_f64;
  const PeakKernels<float>* peak_f32;
  const PeakKernels<double>* peak_f64;
};

// The table of the chosen instruction set: the widest one the machine has, or what KRONFAC_ISA names. The choice is
// made at the first call and stays. Throws std::runtime_error when KRONFAC_ISA is not a known name or names what the
// machine lacks.
const Table& table();

// All names, from the plainest instruction set to the widest.
inline constexpr const char* kTableNames[] = {"portable", "avx2", "avx512", "amx"};

// The table of one instruction set by name; nullptr when it was not built or the machine lacks it.
const Table* find_table(const char* name);

#ifdef KRONFAC_ISA
namespace KRONFAC_ISA {
extern const Table table;
}
#else
// clang-format off
#define KRONFAC_DECLARE_TABLE(isa) namespace isa { extern const Table table; }
// clang-format on
KRONFAC_DECLARE_TABLE(portable)
#ifdef KRONFAC_HAVE_AVX2
KRONFAC_DECLARE_TABLE(avx2)
#endif
#ifdef KRONFAC_HAVE_AVX512
KRONFAC_DECLARE_TABLE(avx512)
#endif
#ifdef KRONFAC_HAVE_AMX
KRONFAC_DECLARE_TABLE(amx)
#endif
#undef KRONFAC_DECLARE_TABLE
#endif

}  // namespace kronfac::kernels
