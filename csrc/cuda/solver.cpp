#include "cuda/solver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/loaded.h"

namespace kronfac::cuda {
namespace {

// As in cusolver_common.h, cublas_api.h and library_types.h of CUDA 12 and 13; enumerations cross the boundary as int.
constexpr int kMajorVersion = 0;         // MAJOR_VERSION of cublasGetProperty
constexpr int kSuccess = 0;              // CUSOLVER_STATUS_SUCCESS
constexpr int kWithVectors = 1;          // CUSOLVER_EIG_MODE_VECTOR
constexpr int kLowerTriangle = 0;        // CUBLAS_FILL_MODE_LOWER
constexpr int kReal32 = 0, kReal64 = 1;  // CUDA_R_32F, CUDA_R_64F
using Handle = struct cusolverDnContext*;
using Parameters = struct cusolverDnParams*;

struct Library {
  int (*version)(int*) = nullptr;
  int (*create)(Handle*) = nullptr;
  int (*create_parameters)(Parameters*) = nullptr;
  int (*set_stream)(Handle, Stream) = nullptr;
  int (*syev_bytes)(Handle, Parameters, int, int, int64_t, int, const void*, int64_t, int, const void*, int, size_t*,
                    size_t*, int64_t) = nullptr;
  int (*syev)(Handle, Parameters, int, int, int64_t, int, void*, int64_t, int, void*, int, void*, size_t, void*, size_t,
              int*, int64_t) = nullptr;
  bool whole = false;
  std::string description;
};

std::string directory_of(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return {};
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? std::string() : path.substr(0, slash + 1);
}

// Something of the cuBLAS that torch was linked with: of this library's own dependencies, not of the whole process.
void* cublas_property() {
  void* const library = own_library();
  return library == nullptr ? nullptr : dlsym(library, "cublasGetProperty");
}

// The one of the release of torch's cuBLAS, which it calls. Torch loads it at the first call of its linear algebra; if
// it has not yet, it lies beside cuBLAS, or, with CUDA 12 from the package index, in a folder of its own, or where the
// system looks.
void* open_library(std::string& reason) {
  void* const property = cublas_property();
  int release = 0;
  if (property == nullptr || reinterpret_cast<int (*)(int, int*)>(property)(kMajorVersion, &release) != kSuccess) {
    reason = "torch has no cuBLAS, beside which it would lie";
    return nullptr;
  }
  if (release != 12 && release != 13) {  // whose enumerations are known
    reason = "torch's cuBLAS is of release " + std::to_string(release) + ", expected 12 or 13";
    return nullptr;
  }
  const std::string name = release == 13 ? "libcusolver.so.12" : "libcusolver.so.11";
  if (void* loaded = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD)) return loaded;
  const std::string beside = directory_of(property);
  if (!beside.empty()) {
    for (const char* folder : {"", "../../cusolver/lib/"}) {
      if (void* opened = dlopen((beside + folder + name).c_str(), RTLD_NOW | RTLD_LOCAL)) return opened;
    }
  }
  if (void* opened = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return opened;
  const char* const error = dlerror();
  reason = error == nullptr ? name + " was not found" : error;
  return nullptr;
}

Library load() {
  Library library;
  std::string reason;
  void* const opened = open_library(reason);
  if (opened == nullptr) {
    library.description = "no cuSOLVER: " + reason;
    return library;
  }
  int version = 0;
  std::string number = "of unknown version";
  if (find(opened, "cusolverGetVersion", library.version) && library.version(&version) == kSuccess) {
    number =
        std::to_string(version / 1000) + "." + std::to_string(version / 100 % 10) + "." + std::to_string(version % 100);
  }
  library.whole = find(opened, "cusolverDnCreate", library.create) &&
                  find(opened, "cusolverDnCreateParams", library.create_parameters) &&
                  find(opened, "cusolverDnSetStream", library.set_stream) &&
                  find(opened, "cusolverDnXsyevBatched_bufferSize", library.syev_bytes) &&
                  find(opened, "cusolverDnXsyevBatched", library.syev);
  library.description = "cuSOLVER " + number + " (" + directory_of(reinterpret_cast<const void*>(library.create)) + ")";
  if (!library.whole) library.description += " has no batched eigensolver, which came with 11.7.1";
  return library;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

[[noreturn]] void fail(const char* what, int status) {
  throw std::runtime_error(std::string("kronfac::damped_eigh: cuSOLVER's ") + what + " returned status " +
                           std::to_string(status) + " (" + library().description + ")");
}

struct Context {
  Handle handle = nullptr;
  Parameters parameters = nullptr;
};

// One for each device and stream, because what a handle owns may not be in use by two streams at once. They are kept to
// the end of the process: when statics are destroyed, CUDA may be gone.
Context& context_of(int32_t device, Stream stream) {
  static auto* const contexts = new std::map<std::pair<int32_t, Stream>, Context>;
  Context& context = (*contexts)[{device, stream}];
  if (context.parameters == nullptr) {
    if (context.handle == nullptr) {
      if (const int status = library().create(&context.handle)) {
        context.handle = nullptr;
        fail("cusolverDnCreate", status);
      }
    }
    if (const int status = library().create_parameters(&context.parameters)) {
      context.parameters = nullptr;
      fail("cusolverDnCreateParams", status);
    }
  }
  return context;
}

}  // namespace

const std::string& solver_description() { return library().description; }
bool solver_available() { return library().whole; }

bool syev_batched(const SyevBatch& batch, int32_t device, Stream stream, const std::function<void*(size_t)>& memory) {
  if (!library().whole) return false;
  static std::mutex mutex;  // a handle serves one thread at a time
  const std::lock_guard<std::mutex> lock(mutex);
  const Context& context = context_of(device, stream);
  if (const int status = library().set_stream(context.handle, stream)) fail("cusolverDnSetStream", status);
  const int type = batch.type == Element::f64 ? kReal64 : kReal32;
  size_t on_device = 0, on_host = 0;
  if (library().syev_bytes(context.handle, context.parameters, kWithVectors, kLowerTriangle, batch.n, type, batch.a,
                           batch.n, type, batch.w, type, &on_device, &on_host, batch.count) != kSuccess) {
    return false;
  }
  std::vector<std::byte> host(on_host);
  void* const workspace = on_device == 0 ? nullptr : memory(on_device);
  const int status =
      library().syev(context.handle, context.parameters, kWithVectors, kLowerTriangle, batch.n, type, batch.a, batch.n,
                     type, batch.w, type, workspace, on_device, host.data(), on_host, batch.failed, batch.count);
  if (status != kSuccess) fail("cusolverDnXsyevBatched", status);
  return true;
}

}  // namespace kronfac::cuda

// For `kronfac info`, which asks through ctypes: the library has no Python module.
extern "C" __attribute__((visibility("default"))) const char* kronfac_cuda_solver() {
  return kronfac::cuda::solver_description().c_str();
}
