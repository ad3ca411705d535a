// The kernels of one instruction set, as a table that the glue and the host module call through.
#pragma once

#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/gemm.h"

namespace kronfac::kernels {

struct Table {
  const char* name;  // "portable", "avx2" or "avx512"
  Blocks blocks_f32, blocks_f64;

  GemmF32 gemm_f32;
  GemmF64 gemm_f64;
  GemmScratch gemm_scratch_f32, gemm_scratch_f64;
};

// The table of the chosen instruction set: the widest one the machine has, or what KRONFAC_ISA names. The choice is made at the
// first call and stays. Throws std::runtime_error when KRONFAC_ISA is not a known name or names what the machine lacks.
const Table& table();

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
#undef KRONFAC_DECLARE_TABLE
#endif

}  // namespace kronfac::kernels
