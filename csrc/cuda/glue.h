// What the CUDA glue shares: the device and stream of a call, results on its device. The only header of this folder
// that sees torch.
#pragma once

#include <algorithm>
#include <vector>

#include "common/arguments.h"
#include "cuda/launch.h"

namespace kronfac::cuda {

inline Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      return Element::f32;
  }
}

// Makes a tensor's device the current one for its lifetime; kernels go to that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

// Uninitialised and contiguous, on the device of `like`. Freed memory is used again only by later work of the same
// stream, so that what a call allocates may be given back before its kernels have run.
inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

}  // namespace kronfac::cuda
