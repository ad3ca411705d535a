#include "cuda/blas.h"

#include "common/stable.h"

namespace kronfac::cuda {

void* blas_handle() {
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return handle;
}

}  // namespace kronfac::cuda
