// The kernels of one accumulation type, and tensors as the kernels see them.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/checks.h"
#include "kernels/table.h"

namespace kronfac::cpu {

// The entries of the chosen table for T = float or double.
template <class T>
struct Kernels;

template <>
struct Kernels<float> {
  static constexpr kernels::Element element = kernels::Element::f32;
  const kernels::Table& table = kernels::table();
  const kernels::Blocks& blocks = table.blocks_f32;
  kernels::GemmF32 gemm = table.gemm_f32;
  kernels::GemmScratch gemm_scratch = table.gemm_scratch_f32;
  bool split_pays(int64_t m, int64_t n, int64_t k) const { return table.gemm_split_pays(m, n, k); }
  const kernels::SymmetricKernels<float>& symmetric = *table.symmetric_f32;
  kernels::CovarianceUpdate<float> covariance = table.covariance_f32, covariance_narrow = table.covariance_narrow_f32;
  const kernels::CovarianceFlat<float>& covariance_flat = *table.covariance_flat_f32;
  const kernels::SecondMomentKernels<float>& second_moment = *table.second_moment_f32;
  const kernels::DampedInverseKernels<float>& damped_inverse = *table.damped_inverse_f32;
  const kernels::BatchEighKernels<float>& batch_eigh = *table.batch_eigh_f32;
  const kernels::PreconditionKernels<float>& precondition = *table.precondition_f32;
  const kernels::OrthogonalizeKernels<float>& orthogonalize = *table.orthogonalize_f32;
};

template <>
struct Kernels<double> {
  static constexpr kernels::Element element = kernels::Element::f64;
  const kernels::Table& table = kernels::table();
  const kernels::Blocks& blocks = table.blocks_f64;
  kernels::GemmF64 gemm = table.gemm_f64;
  kernels::GemmScratch gemm_scratch = table.gemm_scratch_f64;
  bool split_pays(int64_t, int64_t, int64_t) const { return false; }
  const kernels::SymmetricKernels<double>& symmetric = *table.symmetric_f64;
  kernels::CovarianceUpdate<double> covariance = table.covariance_f64, covariance_narrow = table.covariance_narrow_f64;
  const kernels::CovarianceFlat<double>& covariance_flat = *table.covariance_flat_f64;
  const kernels::SecondMomentKernels<double>& second_moment = *table.second_moment_f64;
  const kernels::DampedInverseKernels<double>& damped_inverse = *table.damped_inverse_f64;
  const kernels::BatchEighKernels<double>& batch_eigh = *table.batch_eigh_f64;
  const kernels::PreconditionKernels<double>& precondition = *table.precondition_f64;
  const kernels::OrthogonalizeKernels<double>& orthogonalize = *table.orthogonalize_f64;
};

inline kernels::Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return kernels::Element::f64;
    case ScalarType::BFloat16:
      return kernels::Element::bf16;
    case ScalarType::Half:
      return kernels::Element::f16;
    default:
      return kernels::Element::f32;
  }
}

inline int64_t element_size(kernels::Element type) {
  switch (type) {
    case kernels::Element::f64:
      return 8;
    case kernels::Element::f32:
      return 4;
    default:
      return 2;
  }
}

// Asks for large pages under memory that is about to be written for the first time: a result of tens of megabytes takes
// longer to fault in by small pages than to compute. Advice only; without it everything works the same.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(4 * page)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised contiguous tensor. torch::stable::empty looks its operator up by name and boxes six arguments, which
// takes as long as the product of two small matrices; this asks the allocator alone.
inline Tensor empty_tensor(int64_t dim, const int64_t* sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (dim == 2) strides[0] = std::max<int64_t>(sizes[1], 1);
  int32_t code = aoti_torch_dtype_float32();
  if (type == ScalarType::Double) code = aoti_torch_dtype_float64();
  if (type == ScalarType::BFloat16) code = aoti_torch_dtype_bfloat16();
  if (type == ScalarType::Half) code = aoti_torch_dtype_float16();
  if (type == ScalarType::Int) code = aoti_torch_dtype_int32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[] = {rows, columns};
  const Tensor matrix = empty_tensor(2, sizes, type);
  prefer_large_pages(matrix.mutable_data_ptr(), rows * columns * (type == ScalarType::Double ? 8 : 4));
  return matrix;
}

inline Tensor empty_vector(int64_t size, ScalarType type) { return empty_tensor(1, &size, type); }

// A 2-dimensional tensor as the kernels read it.
inline kernels::Matrix matrix_of(const Tensor& t) {
  return {t.const_data_ptr(), element_of(t), t.stride(0), t.stride(1)};
}

// Checks a damping tensor and returns its values: one for each of `count` matrices, or one for all.
inline std::vector<double> read_damping(const char* op, const Tensor& damping, size_t count) {
  check_damping_shape(op, damping, count);
  const int64_t stride = damping.dim() == 0 ? 0 : damping.stride(0);
  std::vector<double> values(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t at = static_cast<int64_t>(i) * stride;
    values[i] = damping.scalar_type() == ScalarType::Double ? damping.const_data_ptr<double>()[at]
                                                            : static_cast<double>(damping.const_data_ptr<float>()[at]);
    STD_TORCH_CHECK(std::isfinite(values[i]) && values[i] >= 0, "kronfac::", op,
                    ": damping: expected finite values >= 0, got ", values[i], " at index ", i);
  }
  return values;
}

}  // namespace kronfac::cpu
