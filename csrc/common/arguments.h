// The checks of operators that are the same on every device: what the schema cannot say.
#pragma once

#include <optional>

#include "common/overlap.h"

namespace kronfac {

inline void check_covariance_input(const char* op, const Tensor& x, double scale) {
  check_floating(op, "x", x);
  check_dim(op, "x", x, 2, "(m, d)");
  check_weight(op, "scale", scale);
}

inline void check_covariance(const Tensor& out, const Tensor& x, bool bias, double decay, double scale) {
  constexpr const char* op = "covariance_";
  check_covariance_input(op, x, scale);
  check_weight(op, "decay", decay);
  const int64_t d = x.size(1) + (bias ? 1 : 0);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == d && out.size(1) == d, "kronfac::", op, ": out: expected shape (", d,
                  ", ", d, ") for x of shape ", shape_string(x), bias ? " with bias" : "", ", got ", shape_string(out));
  check_dtype(op, "out", out, accumulation_type(x.scalar_type()), "what covariances of this x come out as");
  check_device(op, "out", out, x, "x");
  check_writable(op, "out", out);
}

inline void check_second_moment(const Tensor& out, const Tensor& g, const Tensor& x, bool bias, double decay,
                                double scale) {
  constexpr const char* kOp = "second_moment_";
  check_floating(kOp, "g", g);
  check_dim(kOp, "g", g, 3, "(N, T, o)");
  check_floating(kOp, "x", x);
  check_dim(kOp, "x", x, 3, "(N, T, d)");
  check_dtype(kOp, "x", x, g.scalar_type(), "the type of g");
  STD_TORCH_CHECK(x.size(0) == g.size(0) && x.size(1) == g.size(1), "kronfac::", kOp, ": x: expected shape (",
                  g.size(0), ", ", g.size(1), ", d) for g of shape ", shape_string(g), ", got ", shape_string(x));
  const int64_t rows = g.size(2), columns = x.size(2) + (bias ? 1 : 0);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns, "kronfac::", kOp,
                  ": out: expected shape (", rows, ", ", columns, ") for g of shape ", shape_string(g),
                  " and x of shape ", shape_string(x), bias ? " with bias" : "", ", got ", shape_string(out));
  check_dtype(kOp, "out", out, accumulation_type(g.scalar_type()), "what second moments of this g come out as");
  check_device(kOp, "x", x, g, "g");
  check_device(kOp, "out", out, g, "g");
  check_weight(kOp, "decay", decay);
  check_weight(kOp, "scale", scale);
  check_writable(kOp, "out", out);
}

inline void check_orthogonalize(const Tensor& w, const Tensor& basis, int64_t passes) {
  constexpr const char* kOp = "orthogonalize_";
  check_dim(kOp, "w", w, 1, "(n,)");
  check_dim(kOp, "basis", basis, 2, "(m, n)");
  check_wide(kOp, "w", w);
  check_dtype(kOp, "basis", basis, w.scalar_type(), "the type of w");
  check_device(kOp, "basis", basis, w, "w");
  const int64_t n = w.size(0);
  STD_TORCH_CHECK(basis.size(1) == n, "kronfac::", kOp, ": basis: expected shape (m, ", n, ") for w of shape ",
                  shape_string(w), ", got ", shape_string(basis));
  STD_TORCH_CHECK(passes >= 1, "kronfac::", kOp, ": passes: expected at least 1, got ", passes);
  STD_TORCH_CHECK(n <= 1 || w.stride(0) != 0, "kronfac::", kOp,
                  ": w: expected a tensor whose elements have memory of their own, got an expanded one; clone it");
  STD_TORCH_CHECK(!overlaps(w, basis), "kronfac::", kOp,
                  ": w: expected memory apart from basis, got a vector that shares memory with it; clone it");
}

inline void check_damped_inverse(const std::vector<Tensor>& factors, const Tensor& damping) {
  constexpr const char* kOp = "damped_inverse";
  check_wide(kOp, "damping", damping);
  for (size_t i = 0; i < factors.size(); ++i) {
    check_square(kOp, item("factors", i), factors[i]);
    check_dtype(kOp, item("factors", i), factors[i], damping.scalar_type(), "the type of damping");
    check_device(kOp, item("factors", i), factors[i], damping, "damping");
  }
  check_damping_shape(kOp, damping, factors.size());
}

inline void check_damped_eigh(const std::vector<Tensor>& factors, const Tensor& damping,
                              const std::optional<std::vector<Tensor>>& basis) {
  constexpr const char* kOp = "damped_eigh";
  check_wide(kOp, "damping", damping);
  const ScalarType type = damping.scalar_type();
  for (size_t i = 0; i < factors.size(); ++i) {
    check_square(kOp, item("factors", i), factors[i]);
    check_dtype(kOp, item("factors", i), factors[i], type, "the type of damping");
    check_device(kOp, item("factors", i), factors[i], damping, "damping");
  }
  if (basis) {
    check_length(kOp, "basis", *basis, factors.size(), "factors");
    for (size_t i = 0; i < factors.size(); ++i) {
      const Tensor& q = (*basis)[i];
      const Arg arg = item("basis", i);
      check_square(kOp, arg, q);
      check_dtype(kOp, arg, q, type, "the type of damping");
      check_device(kOp, arg, q, damping, "damping");
      STD_TORCH_CHECK(q.size(0) == factors[i].size(0), "kronfac::", kOp, ": ", arg, ": expected the shape of ",
                      item("factors", i), " ", shape_string(factors[i]), ", got ", shape_string(q));
    }
  }
  check_damping_shape(kOp, damping, factors.size());
}

// Checks grads[i] (o, i) against a left (o, o) and a right (i, i) matrix, all of one floating type except that grads
// may be bfloat16 or float16 beside float32.
inline void check_layer(const char* op, size_t at, const Tensor& grad, const char* left_name, const Tensor& left,
                        const char* right_name, const Tensor& right, const Tensor& first, const char* first_name) {
  const Arg grad_arg = item("grads", at), left_arg = item(left_name, at), right_arg = item(right_name, at);
  check_dim(op, grad_arg, grad, 2, "(out, in)");
  check_floating(op, grad_arg, grad);
  check_square(op, left_arg, left);
  check_square(op, right_arg, right);
  check_dtype(op, left_arg, left, first.scalar_type(), TypeOf{first_name});
  check_dtype(op, right_arg, right, first.scalar_type(), TypeOf{first_name});
  STD_TORCH_CHECK(grad.scalar_type() == first.scalar_type() ||
                      (is_narrow(grad.scalar_type()) && first.scalar_type() == ScalarType::Float),
                  "kronfac::", op, ": ", grad_arg, ": expected ", dtype_name(first), " (the type of ", first_name,
                  first.scalar_type() == ScalarType::Float ? "), bfloat16 or float16, got " : "), got ",
                  dtype_name(grad));
  check_device(op, grad_arg, grad, first, first_name);
  check_device(op, left_arg, left, first, first_name);
  check_device(op, right_arg, right, first, first_name);
  STD_TORCH_CHECK(left.size(0) == grad.size(0), "kronfac::", op, ": ", left_arg, ": expected shape (", grad.size(0),
                  ", ", grad.size(0), ") for ", grad_arg, " of shape ", shape_string(grad), ", got ",
                  shape_string(left));
  STD_TORCH_CHECK(right.size(0) == grad.size(1), "kronfac::", op, ": ", right_arg, ": expected shape (", grad.size(1),
                  ", ", grad.size(1), ") for ", grad_arg, " of shape ", shape_string(grad), ", got ",
                  shape_string(right));
}

inline void check_kron_precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& left,
                                    const std::vector<Tensor>& right) {
  constexpr const char* kOp = "kron_precondition";
  check_length(kOp, "left", left, grads.size(), "grads");
  check_length(kOp, "right", right, grads.size(), "grads");
  for (size_t l = 0; l < grads.size(); ++l) {
    check_wide(kOp, item("left", l), left[l]);
    check_layer(kOp, l, grads[l], "left", left[l], "right", right[l], left[0], "left[0]");
  }
}

inline void check_eigen_precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& left_vectors,
                                     const std::vector<Tensor>& right_vectors, const std::vector<Tensor>& eigenvalues,
                                     const Tensor& damping) {
  constexpr const char* kOp = "eigen_precondition";
  check_wide(kOp, "damping", damping);
  check_length(kOp, "left_vectors", left_vectors, grads.size(), "grads");
  check_length(kOp, "right_vectors", right_vectors, grads.size(), "grads");
  check_length(kOp, "eigenvalues", eigenvalues, grads.size(), "grads");
  for (size_t l = 0; l < grads.size(); ++l) {
    check_layer(kOp, l, grads[l], "left_vectors", left_vectors[l], "right_vectors", right_vectors[l], damping,
                "damping");
    const Arg arg = item("eigenvalues", l);
    check_dim(kOp, arg, eigenvalues[l], 2, "(out, in)");
    check_dtype(kOp, arg, eigenvalues[l], damping.scalar_type(), "the type of damping");
    check_device(kOp, arg, eigenvalues[l], damping, "damping");
    STD_TORCH_CHECK(eigenvalues[l].size(0) == grads[l].size(0) && eigenvalues[l].size(1) == grads[l].size(1),
                    "kronfac::", kOp, ": ", arg, ": expected the shape of ", item("grads", l), " ",
                    shape_string(grads[l]), ", got ", shape_string(eigenvalues[l]));
  }
  check_damping_shape(kOp, damping, grads.size());
}

}  // namespace kronfac
