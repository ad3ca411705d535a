// Argument checks shared by the CPU and CUDA glue. A message names the operator, the argument, what was expected and
// what came:
//   kronfac::covariance: x: expected a 2-dimensional tensor (m, d), got shape (3,)
// Everything is checked before anything is allocated, written or run in parallel.
#pragma once

#include <cmath>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "common/stable.h"

namespace kronfac {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::ostringstream s;
  s << '(';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << (t.dim() == 1 ? ",)" : ")");
  return s.str();
}

inline const char* dtype_name(const Tensor& t) { return torch::headeronly::toString(t.scalar_type()); }

// Names of arguments and reasons, put into words only where a check fails: a call with fifty layers makes hundreds of
// checks.
struct Arg {
  Arg(const char* name_) : name(name_) {}  // NOLINT(google-explicit-constructor)
  Arg(const char* list, size_t index_) : name(list), index(static_cast<int64_t>(index_)) {}
  const char* name;
  int64_t index = -1;  // of an element of a list: "grads[3]"
};
inline std::ostream& operator<<(std::ostream& s, const Arg& arg) {
  s << arg.name;
  return arg.index < 0 ? s : s << '[' << arg.index << ']';
}
inline Arg item(const char* list, size_t i) { return {list, i}; }

struct TypeOf {
  const char* arg;
};
inline std::ostream& operator<<(std::ostream& s, const TypeOf& type) { return s << "the type of " << type.arg; }

inline void check_dim(const char* op, const Arg& arg, const Tensor& t, int64_t dim, const char* meaning) {
  STD_TORCH_CHECK(t.dim() == dim, "kronfac::", op, ": ", arg, ": expected a ", dim, "-dimensional tensor ", meaning,
                  ", got shape ", shape_string(t));
}

inline bool is_wide(ScalarType type) { return type == ScalarType::Float || type == ScalarType::Double; }
inline bool is_narrow(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// Factors, bases, eigenvalues, damping: float32 or float64.
inline void check_wide(const char* op, const Arg& arg, const Tensor& t) {
  STD_TORCH_CHECK(is_wide(t.scalar_type()), "kronfac::", op, ": ", arg, ": expected float32 or float64, got ",
                  dtype_name(t));
}

// Activations and gradients: also bfloat16 and float16.
inline void check_floating(const char* op, const Arg& arg, const Tensor& t) {
  STD_TORCH_CHECK(is_wide(t.scalar_type()) || is_narrow(t.scalar_type()), "kronfac::", op, ": ", arg,
                  ": expected float32, float64, bfloat16 or float16, got ", dtype_name(t));
}

inline int64_t element_bytes(ScalarType type) { return type == ScalarType::Double ? 8 : is_narrow(type) ? 2 : 4; }

// The type sums are kept in: float64 for float64 input, float32 for everything narrower.
inline ScalarType accumulation_type(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Why>
void check_dtype(const char* op, const Arg& arg, const Tensor& t, ScalarType expected, const Why& why) {
  STD_TORCH_CHECK(t.scalar_type() == expected, "kronfac::", op, ": ", arg, ": expected ",
                  torch::headeronly::toString(expected), " (", why, "), got ", dtype_name(t));
}

inline void check_device(const char* op, const Arg& arg, const Tensor& t, const Tensor& reference,
                         const char* reference_arg) {
  STD_TORCH_CHECK(t.device() == reference.device(), "kronfac::", op, ": ", arg, ": expected the device of ",
                  reference_arg, ", got another one; move both to one device");
}

inline void check_finite(const char* op, const char* arg, double value) {
  STD_TORCH_CHECK(std::isfinite(value), "kronfac::", op, ": ", arg, ": expected a finite number, got ", value);
}

// A result must have memory of its own for every entry.
inline void check_writable(const char* op, const char* arg, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) != 0, "kronfac::", op, ": ", arg,
                    ": expected a tensor whose elements have memory of their own, got an expanded one; clone it");
  }
}

inline void check_weight(const char* op, const char* arg, double value) {
  STD_TORCH_CHECK(std::isfinite(value) && value >= 0, "kronfac::", op, ": ", arg,
                  ": expected a finite number >= 0, got ", value);
}

inline void check_square(const char* op, const Arg& arg, const Tensor& t) {
  check_dim(op, arg, t, 2, "(n, n)");
  STD_TORCH_CHECK(t.size(0) == t.size(1), "kronfac::", op, ": ", arg, ": expected a square matrix, got shape ",
                  shape_string(t));
}

inline void check_length(const char* op, const char* arg, const std::vector<Tensor>& list, size_t expected,
                         const char* reference_arg) {
  STD_TORCH_CHECK(list.size() == expected, "kronfac::", op, ": ", arg, ": expected ", expected,
                  " tensors, one for each of ", reference_arg, ", got ", list.size());
}

inline void check_damping_shape(const char* op, const Tensor& damping, size_t count) {
  STD_TORCH_CHECK(damping.dim() == 0 || (damping.dim() == 1 && damping.size(0) == static_cast<int64_t>(count)),
                  "kronfac::", op, ": damping: expected shape (", count, ",), one value for each matrix, or (), got ",
                  shape_string(damping));
}

}  // namespace kronfac
