// A library with the names and signatures of cuBLAS in use, which multiplies by loops and keeps what it was told.
#include "naive_gemm.h"

using namespace kronfac::cuda;

namespace {

constexpr int kSuccess = 0, kNotInitialized = 1, kInvalidValue = 7;
int handle;  // its address is the handle
int math_mode = 0, refuse_after = -1, version_major = 13;
int modes[64], calls = 0;

Element element(int type) {
  return type == 1 ? Element::f64 : type == 2 ? Element::f16 : type == 14 ? Element::bf16 : Element::f32;
}

int multiply(void* given, int op_a, int op_b, const void* alpha, const void* beta, int compute, int algorithm,
             int a_type, int b_type, int c_type, Gemm g) {
  if (given != &handle) return kNotInitialized;
  if (refuse_after >= 0 && calls >= refuse_after) return kInvalidValue;
  const bool wide = a_type == 1;
  if (a_type != b_type || compute != (wide ? 70 : 68) || algorithm != -1) return kInvalidValue;
  g.a_transposed = op_a == 1, g.b_transposed = op_b == 1, g.type = element(a_type), g.c_type = element(c_type);
  g.alpha = wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
  g.beta = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
  execute(g);
  modes[calls++ % 64] = math_mode;
  return kSuccess;
}

}  // namespace

extern "C" {

int cublasGemmEx(void* given, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                 int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                 int compute, int algorithm) {
  const Gemm g{.m = m, .n = n, .k = k, .a = a, .b = b, .c = c, .lda = lda, .ldb = ldb, .ldc = ldc};
  return multiply(given, op_a, op_b, alpha, beta, compute, algorithm, a_type, b_type, c_type, g);
}

int cublasGemmStridedBatchedEx(void* given, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                               int a_type, int lda, long long a_stride, const void* b, int b_type, int ldb,
                               long long b_stride, const void* beta, void* c, int c_type, int ldc, long long c_stride,
                               int count, int compute, int algorithm) {
  Gemm g{.m = m, .n = n, .k = k, .a = a, .b = b, .c = c, .lda = lda, .ldb = ldb, .ldc = ldc};
  g.count = count, g.a_stride = a_stride, g.b_stride = b_stride, g.c_stride = c_stride;
  return multiply(given, op_a, op_b, alpha, beta, compute, algorithm, a_type, b_type, c_type, g);
}

int cublasGemmBatchedEx(void* given, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* const* a,
                        int a_type, int lda, const void* const* b, int b_type, int ldb, const void* beta,
                        void* const* c, int c_type, int ldc, int count, int compute, int algorithm) {
  Gemm g{.m = m, .n = n, .k = k, .a = a, .b = b, .c = const_cast<void**>(c), .lda = lda, .ldb = ldb, .ldc = ldc};
  g.count = count, g.pointers = true;
  return multiply(given, op_a, op_b, alpha, beta, compute, algorithm, a_type, b_type, c_type, g);
}

int cublasGetMathMode(void* given, int* mode) {
  *mode = math_mode;
  return given == &handle ? kSuccess : kNotInitialized;
}

int cublasSetMathMode(void* given, int mode) {
  math_mode = mode;
  return given == &handle ? kSuccess : kNotInitialized;
}

int cublasGetProperty(int property, int* value) {
  *value = property == 0 ? version_major : property == 1 ? 2 : 5;
  return kSuccess;
}

const char* cublasGetStatusName(int status) {
  return status == kInvalidValue ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_OTHER";
}

// For the tests.
void* fake_handle() { return &handle; }
void fake_set(int mode, int refuse, int major) {
  math_mode = mode, refuse_after = refuse, version_major = major, calls = 0;
}
int fake_mode() { return math_mode; }
int fake_calls(int* of_calls) {
  for (int i = 0; i < calls && i < 64; ++i) of_calls[i] = modes[i];
  return calls;
}
}
