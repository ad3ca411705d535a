// The checks of operators that are the same on every device: what the schema cannot say.
#pragma once

#include "common/overlap.h"

namespace kronfac {

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

}  // namespace kronfac
