// What is used of the binary interface of cuBLAS 12 and 13: enumerations are passed as int.
#pragma once

namespace kronfac::cuda::cublas {

using Handle = void*;
using Status = int;

inline constexpr int kAsIs = 0, kTransposed = 1;                // cublasOperation_t
inline constexpr int kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 14;  // cudaDataType
inline constexpr int kSumsInF32 = 68, kSumsInF64 = 70;          // cublasComputeType_t
inline constexpr int kDefaultAlgorithm = -1;                    // cublasGemmAlgo_t
inline constexpr int kMajor = 0, kMinor = 1, kPatch = 2;        // libraryPropertyType
inline constexpr int kDefaultMath = 0, kTf32Math = 3;           // cublasMath_t, one of these ...
inline constexpr int kMathMask = 15;                            // ... in the low bits,
inline constexpr int kNoReducedReductions = 16;                 // with flags above

using GemmEx = Status(Handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                      int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                      int compute, int algorithm);
using GemmStridedBatchedEx = Status(Handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                                    int a_type, int lda, long long a_stride, const void* b, int b_type, int ldb,
                                    long long b_stride, const void* beta, void* c, int c_type, int ldc,
                                    long long c_stride, int count, int compute, int algorithm);
using GemmBatchedEx = Status(Handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* const* a,
                             int a_type, int lda, const void* const* b, int b_type, int ldb, const void* beta,
                             void* const* c, int c_type, int ldc, int count, int compute, int algorithm);
using GetMathMode = Status(Handle, int* mode);
using SetMathMode = Status(Handle, int mode);
using GetProperty = Status(int property, int* value);
using GetStatusName = const char*(Status);

}  // namespace kronfac::cuda::cublas
