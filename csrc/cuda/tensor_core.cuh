// What a warp does on tensor cores, for block.warp (block.cuh): the instruction on the GPU, and on the CPU the same
// from what all 32 lanes hold, laid out as the PTX manual has it. g = lane / 4, t = lane % 4.
#pragma once

#include "cuda/block.cuh"

namespace kronfac::cuda {

// Four 8 x 8 matrices of 16-bit entries from shared memory, transposed. Lane 8 q + r gives the address of row r of
// matrix q, a multiple of 16, and receives of each matrix the entries (2 t, g) and (2 t + 1, g), the first in the lower
// half of fragment[q].
struct LoadTransposed {
  struct Lane {
    const void* row;
    uint32_t* fragment;
  };
#if defined(__CUDACC__)
  __device__ __forceinline__ static void run(const Lane& lane) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(lane.fragment[0]), "=r"(lane.fragment[1]), "=r"(lane.fragment[2]), "=r"(lane.fragment[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(lane.row)))
                 : "memory");
  }
#else
  static void run(const Lane (&lanes)[32]) {
    for (int q = 0; q < 4; ++q) {
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t pair = 0;
        for (int e = 1; e >= 0; --e) {
          uint16_t entry;
          const Lane& owner = lanes[8 * q + 2 * (lane % 4) + e];
          std::memcpy(&entry, static_cast<const char*>(owner.row) + 2 * (lane / 4), sizeof entry);
          pair = pair << 16 | entry;
        }
        lanes[lane].fragment[q] = pair;
      }
    }
  }
#endif
};

// Rounded to the 11 bits of a TF32 number, ties away from zero, in the bits of a float.
#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t tf32_bits(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
#else
inline uint32_t tf32_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fffffff;
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & 0xffffe000;
}
#endif

// sum (16, 8) += a (16, kDepth) b (kDepth, 8). A lane holds of sum the entries (g, 2 t), (g, 2 t + 1), (g + 8, 2 t),
// (g + 8, 2 t + 1). In 16 bits (kDepth 16) a[r] is (g + 8 (r % 2), 2 t + 8 (r / 2)) and the entry right of it, b[r] is
// (2 t + 8 r, g) and the one below; in TF32 (kDepth 8) a[r] is (g + 8 (r % 2), t + 4 (r / 2)) and b[r] (t + 4 r, g).
template <class In>
struct MultiplyAdd {
  static constexpr int kDepth = 32 / static_cast<int>(sizeof(In));
  struct Lane {
    float* sum;
    const uint32_t *a, *b;
  };
#if defined(__CUDACC__)
  __device__ __forceinline__ static void run(const Lane& lane);
#else
  static float entry(uint32_t word, int e) {
    if constexpr (sizeof(In) == 2) {
      return widened<float>(In{static_cast<uint16_t>(word >> 16 * e)});
    } else {
      const uint32_t bits = word & 0xffffe000;  // the others are ignored
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
  static void run(const Lane (&lanes)[32]) {
    constexpr int kPack = 4 / static_cast<int>(sizeof(In));  // entries of a register
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int e = 0; e < kPack; ++e) {
          a[g + 8 * (r % 2)][kPack * t + kDepth / 2 * (r / 2) + e] = entry(lanes[lane].a[r], e);
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int e = 0; e < kPack; ++e) b[kPack * t + kDepth / 2 * r + e][g] = entry(lanes[lane].b[r], e);
      }
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
      }
      for (int column = 0; column < 8; ++column) {
        lanes[4 * (row % 8) + column / 2].sum[row / 8 * 2 + column % 2] += sum[column];
      }
    }
  }
#endif
};

#if defined(__CUDACC__)
#define KRONFAC_MULTIPLY_ADD(instruction)                                                     \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(lane.sum[0]), "+f"(lane.sum[1]), "+f"(lane.sum[2]), "+f"(lane.sum[3])   \
               : "r"(lane.a[0]), "r"(lane.a[1]), "r"(lane.a[2]), "r"(lane.a[3]), "r"(lane.b[0]), "r"(lane.b[1]))
template <>
__device__ __forceinline__ void MultiplyAdd<BFloat16>::run(const Lane& lane) {
  KRONFAC_MULTIPLY_ADD("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ __forceinline__ void MultiplyAdd<Half>::run(const Lane& lane) {
  KRONFAC_MULTIPLY_ADD("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
__device__ __forceinline__ void MultiplyAdd<float>::run(const Lane& lane) {
  KRONFAC_MULTIPLY_ADD("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef KRONFAC_MULTIPLY_ADD
#endif

}  // namespace kronfac::cuda
