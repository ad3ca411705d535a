// Register tiles and cache blocks of the matrix product, per instruction set and element type, with the reason for
// each.
#pragma once

#include <cstdint>

namespace kronfac::kernels {

// One product C (m, n) += A (m, k) B (k, n) is cut into MR x NR tiles held in registers, KC long; MC x KC of A and KC x
// NC of B are packed, both as panels NR wide, so that a symmetric update packs its one operand once; MR divides NR for
// that.
struct Blocks {
  int32_t vector_bytes;
  int32_t mr, nr;  // register tile
  int32_t kc;      // one accumulation run: also bounds the rounding error of a float32 dot product before it joins C
  int32_t mc, nc;  // packed block of A, packed block of B
};

// clang-format off
namespace blocks {
// 32 registers: 8 x 3 accumulators + 3 of B + 1 broadcast. 11 loads feed 24 multiply-adds, below the two loads per cycle that
// AVX-512 cores have. A B panel is 36 KiB, most of an L1 of 48 KiB; mc x kc is 144 KiB of an L2 of 1 MiB or more.
inline constexpr Blocks avx512_f32{64, 8, 48, 192, 192, 3072};
inline constexpr Blocks avx512_f64{64, 8, 24, 192, 96, 1536};
// What is too small for matrix units runs on the vector units.
inline constexpr Blocks amx_f32 = avx512_f32, amx_f64 = avx512_f64;
// 16 registers: 4 x 3 accumulators + 3 of B + 1 broadcast; 7 loads feed 12 multiply-adds. A B panel of 24 KiB stays in L1.
inline constexpr Blocks avx2_f32{32, 4, 24, 256, 144, 3072};
inline constexpr Blocks avx2_f64{32, 4, 12, 256, 72, 1536};
#if defined(__aarch64__)
// 32 registers: 4 x 4 accumulators + 4 of B + broadcasts by lane.
inline constexpr Blocks portable_f32{16, 4, 16, 256, 128, 2048};
inline constexpr Blocks portable_f64{16, 4, 8, 256, 64, 1024};
#else
// 16 registers without fused multiply-add: 4 x 2 accumulators leave room for the products.
inline constexpr Blocks portable_f32{16, 4, 8, 256, 128, 2048};
inline constexpr Blocks portable_f64{16, 4, 4, 256, 64, 1024};
#endif
}  // namespace blocks
// clang-format on

#ifdef KRONFAC_ISA
#define KRONFAC_JOIN_(a, b) a##b
#define KRONFAC_JOIN(a, b) KRONFAC_JOIN_(a, b)
namespace KRONFAC_ISA {
inline constexpr Blocks kBlocksF32 = blocks::KRONFAC_JOIN(KRONFAC_ISA, _f32);
inline constexpr Blocks kBlocksF64 = blocks::KRONFAC_JOIN(KRONFAC_ISA, _f64);
}  // namespace KRONFAC_ISA
#undef KRONFAC_JOIN
#undef KRONFAC_JOIN_
#endif

}  // namespace kronfac::kernels
