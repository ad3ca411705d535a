#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace kronfac::cuda {

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("kronfac: the CUDA kernel ") + kernel +
                           " could not be launched: " + cudaGetErrorString(error));
}

}  // namespace kronfac::cuda
