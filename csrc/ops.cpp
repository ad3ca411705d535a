// Every operator's schema, and nothing else: the contract in one place. Implementations register themselves in csrc/cpu
// and csrc/cuda, fakes and autograd in python/kronfac/ops.
#include "common/stable.h"

STABLE_TORCH_LIBRARY(kronfac, m) {
  m.def("covariance(Tensor x, bool bias=False, float scale=1.0) -> Tensor");
  m.def("covariance_(Tensor(a!) out, Tensor x, bool bias=False, float decay=0.0, float scale=1.0) -> ()");

  m.def(
      "conv_covariance(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups=1, "
      "bool bias=False, float scale=1.0) -> Tensor");
  m.def(
      "conv_covariance_(Tensor(a!) out, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups=1, bool bias=False, float decay=0.0, float scale=1.0) -> ()");

  m.def("damped_inverse(Tensor[] factors, Tensor damping) -> (Tensor[] inverses, Tensor info)");
  m.def(
      "damped_eigh(Tensor[] factors, Tensor damping, Tensor[]? basis=None) -> "
      "(Tensor[] eigenvalues, Tensor[] eigenvectors, Tensor info)");

  m.def("kron_precondition(Tensor[] grads, Tensor[] left, Tensor[] right) -> (Tensor[] out, Tensor dots)");
  m.def(
      "eigen_precondition(Tensor[] grads, Tensor[] left_vectors, Tensor[] right_vectors, Tensor[] eigenvalues, "
      "Tensor damping) -> (Tensor[] out, Tensor dots)");

  m.def("second_moment_(Tensor(a!) out, Tensor g, Tensor x, bool bias=False, float decay=0.0, float scale=1.0) -> ()");
  m.def("orthogonalize_(Tensor(a!) w, Tensor basis, int passes=2) -> Tensor");
}
