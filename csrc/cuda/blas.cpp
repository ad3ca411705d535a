// cuBLAS, looked up and called: blas.h. No torch in here, so that tests give it a cuBLAS of their own.
#include "cuda/blas.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/cublas_interface.h"
#include "cuda/loaded.h"

namespace kronfac::cuda {
namespace {

struct Functions {
  cublas::GemmEx* gemm;
  cublas::GemmStridedBatchedEx* gemm_strided;
  cublas::GemmBatchedEx* gemm_pointers;
  cublas::GetMathMode* get_math_mode;
  cublas::SetMathMode* set_math_mode;
  cublas::GetStatusName* status_name;
  std::string version;
};

// Of torch's cuBLAS: a handle belongs to the library that made it.
std::optional<Functions> look_up() {
  void* const library = own_library();
  if (library == nullptr) return std::nullopt;
  Functions f{};
  cublas::GetProperty* property = nullptr;
  const bool all =
      find(library, "cublasGemmEx", f.gemm) && find(library, "cublasGemmStridedBatchedEx", f.gemm_strided) &&
      find(library, "cublasGemmBatchedEx", f.gemm_pointers) && find(library, "cublasGetMathMode", f.get_math_mode) &&
      find(library, "cublasSetMathMode", f.set_math_mode) && find(library, "cublasGetStatusName", f.status_name) &&
      find(library, "cublasGetProperty", property);
  int major = 0, minor = 0, patch = 0;
  if (!all || property(cublas::kMajor, &major) != 0 || property(cublas::kMinor, &minor) != 0 ||
      property(cublas::kPatch, &patch) != 0) {
    return std::nullopt;
  }
  // The enumerations were compared with the headers of these releases. An unknown one is not called on trust.
  if (major != 12 && major != 13) return std::nullopt;
  f.version = std::to_string(major) + '.' + std::to_string(minor) + '.' + std::to_string(patch);
  return f;
}

const std::optional<Functions>& functions() {
  static const std::optional<Functions> found = look_up();
  return found;
}

void check(cublas::Status status, const char* call) {
  if (status == 0) return;
  const char* const name = functions()->status_name(status);
  throw std::runtime_error(std::string("kronfac: ") + call + " failed: " + (name == nullptr ? "status" : name) + " (" +
                           std::to_string(status) + ")");
}

// The handle's math mode, put back at the end of a list of products, whatever the end.
class MathMode {
 public:
  explicit MathMode(cublas::Handle handle) : handle_(handle) {
    check(functions()->get_math_mode(handle, &original_), "cublasGetMathMode");
    current_ = original_;
  }
  MathMode(const MathMode&) = delete;
  MathMode& operator=(const MathMode&) = delete;
  ~MathMode() {
    if (current_ != original_) functions()->set_math_mode(handle_, original_);
  }

  int original() const { return original_; }
  void set(int mode) {
    if (mode == current_) return;
    check(functions()->set_math_mode(handle_, mode), "cublasSetMathMode");
    current_ = mode;
  }

 private:
  cublas::Handle handle_;
  int original_ = 0, current_ = 0;
};

int type_of(Element type) {
  switch (type) {
    case Element::f64:
      return cublas::kF64;
    case Element::bf16:
      return cublas::kBF16;
    case Element::f16:
      return cublas::kF16;
    default:
      return cublas::kF32;
  }
}

int narrow(int64_t value, const char* name) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    throw std::runtime_error(std::string("kronfac: a product of matrices by cuBLAS: ") + name +
                             ": expected at most 2147483647, got " + std::to_string(value));
  }
  return static_cast<int>(value);
}

void check_gemm(const Gemm& g) {
  const auto need = [](bool good, const char* what) {
    if (!good) throw std::logic_error(std::string("kronfac: a product of matrices by cuBLAS: ") + what);
  };
  need(g.lda >= (g.a_transposed ? g.k : g.m), "lda is less than the rows of a");
  need(g.ldb >= (g.b_transposed ? g.n : g.k), "ldb is less than the rows of b");
  need(g.ldc >= g.m, "ldc is less than the rows of c");
  need(g.k > 0, "k is 0");
  need(g.c_type == g.type || (g.c_type == Element::f32 && g.type != Element::f64), "no such types");
}

// A batch is a dimension of a grid, which ends there.
constexpr int64_t kMostInCall = 65535;

// The products of a batch from number `first` on that go in one call.
Gemm part_of(const Gemm& g, int64_t first) {
  if (first == 0 && g.count <= kMostInCall) return g;
  const auto bytes = [&](Element type) { return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2; };
  const int64_t pointer = sizeof(void*);
  const int64_t c_step = g.pointers ? pointer : g.c_stride * bytes(g.c_type);
  Gemm part = g;
  part.count = std::min(kMostInCall, g.count - first);
  part.a = static_cast<const char*>(g.a) + first * (g.pointers ? pointer : g.a_stride * bytes(g.type));
  part.b = static_cast<const char*>(g.b) + first * (g.pointers ? pointer : g.b_stride * bytes(g.type));
  part.c = static_cast<char*>(g.c) + first * c_step;
  return part;
}

void run_one(cublas::Handle handle, const Gemm& g) {
  const Functions& f = *functions();
  const bool wide = g.type == Element::f64;
  const float alpha32 = static_cast<float>(g.alpha), beta32 = static_cast<float>(g.beta);
  const void* const alpha = wide ? static_cast<const void*>(&g.alpha) : &alpha32;
  const void* const beta = wide ? static_cast<const void*>(&g.beta) : &beta32;
  const int op_a = g.a_transposed ? cublas::kTransposed : cublas::kAsIs;
  const int op_b = g.b_transposed ? cublas::kTransposed : cublas::kAsIs;
  const int m = narrow(g.m, "m"), n = narrow(g.n, "n"), k = narrow(g.k, "k"), count = narrow(g.count, "count");
  const int lda = narrow(g.lda, "lda"), ldb = narrow(g.ldb, "ldb"), ldc = narrow(g.ldc, "ldc");
  const int type = type_of(g.type), c_type = type_of(g.c_type);
  const int compute = wide ? cublas::kSumsInF64 : cublas::kSumsInF32;
  if (g.pointers) {
    check(f.gemm_pointers(handle, op_a, op_b, m, n, k, alpha, static_cast<const void* const*>(g.a), type, lda,
                          static_cast<const void* const*>(g.b), type, ldb, beta, static_cast<void* const*>(g.c), c_type,
                          ldc, count, compute, cublas::kDefaultAlgorithm),
          "cublasGemmBatchedEx");
  } else if (count == 1) {
    check(f.gemm(handle, op_a, op_b, m, n, k, alpha, g.a, type, lda, g.b, type, ldb, beta, g.c, c_type, ldc, compute,
                 cublas::kDefaultAlgorithm),
          "cublasGemmEx");
  } else {
    check(f.gemm_strided(handle, op_a, op_b, m, n, k, alpha, g.a, type, lda, g.a_stride, g.b, type, ldb, g.b_stride,
                         beta, g.c, c_type, ldc, g.c_stride, count, compute, cublas::kDefaultAlgorithm),
          "cublasGemmStridedBatchedEx");
  }
}

}  // namespace

bool available() { return functions().has_value(); }

const char* blas_version() { return functions() ? functions()->version.c_str() : ""; }

bool tf32_allowed() {
  if (!available()) return false;
  int mode = cublas::kDefaultMath;
  check(functions()->get_math_mode(blas_handle(), &mode), "cublasGetMathMode");
  return (mode & cublas::kMathMask) == cublas::kTf32Math;
}

void run(const std::vector<Gemm>& gemms, Precision precision) {
  if (!available()) throw std::logic_error("kronfac: a product of matrices by cuBLAS, which was not found");
  const cublas::Handle handle = blas_handle();
  MathMode mode(handle);
  for (const Gemm& g : gemms) {
    if (g.m == 0 || g.n == 0 || g.count == 0) continue;
    check_gemm(g);
    if (g.c_type == Element::bf16 || g.c_type == Element::f16) {
      // A sum that is cut into parts would else be put together in the type of c.
      mode.set(cublas::kDefaultMath | cublas::kNoReducedReductions);
    } else {
      mode.set(precision == Precision::full ? cublas::kDefaultMath : mode.original());
    }
    for (int64_t first = 0; first < g.count; first += kMostInCall) run_one(handle, part_of(g, first));
  }
}

}  // namespace kronfac::cuda

// For `kronfac info`, which opens this library by its path.
extern "C" __attribute__((visibility("default"))) const char* kronfac_blas_version() {
  return kronfac::cuda::blas_version();
}
