// Every operator's schema, and nothing else: the contract in one place. Implementations register themselves in csrc/cpu
// and csrc/cuda, fakes and autograd in python/kronfac/ops.
#include <string>

#include "common/stable.h"

namespace {

// Defines an operator and its overload `detached`: the same kernels under a name that has no kernel in Python at the
// dispatcher's autograd key. Entering and leaving the interpreter there takes several times as long as a small matrix.
template <class Library>
void define(Library& m, const std::string& name, const std::string& signature) {
  m.def((name + signature).c_str());
  m.def((name + ".detached" + signature).c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(kronfac, m) {
  define(m, "covariance", "(Tensor x, bool bias=False, float scale=1.0) -> Tensor");
  define(m, "covariance_", "(Tensor(a!) out, Tensor x, bool bias=False, float decay=0.0, float scale=1.0) -> ()");

  define(m, "conv_covariance",
         "(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups=1, "
         "bool bias=False, float scale=1.0) -> Tensor");
  define(m, "conv_covariance_",
         "(Tensor(a!) out, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
         "int groups=1, bool bias=False, float decay=0.0, float scale=1.0) -> ()");

  define(m, "damped_inverse", "(Tensor[] factors, Tensor damping) -> (Tensor[] inverses, Tensor info)");
  define(m, "damped_eigh",
         "(Tensor[] factors, Tensor damping, Tensor[]? basis=None) -> "
         "(Tensor[] eigenvalues, Tensor[] eigenvectors, Tensor info)");

  define(m, "kron_precondition", "(Tensor[] grads, Tensor[] left, Tensor[] right) -> (Tensor[] out, Tensor dots)");
  define(m, "eigen_precondition",
         "(Tensor[] grads, Tensor[] left_vectors, Tensor[] right_vectors, Tensor[] eigenvalues, "
         "Tensor damping) -> (Tensor[] out, Tensor dots)");

  define(m, "second_moment_",
         "(Tensor(a!) out, Tensor g, Tensor x, bool bias=False, float decay=0.0, float scale=1.0) -> ()");
  define(m, "orthogonalize_", "(Tensor(a!) w, Tensor basis, int passes=2) -> Tensor");
}
