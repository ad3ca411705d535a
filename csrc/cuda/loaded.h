// Functions of the libraries that torch has loaded, by name.
#pragma once

#include <dlfcn.h>

namespace kronfac::cuda {

// This library: a symbol is looked for among its own dependencies (libtorch, libtorch_cuda, its cuBLAS), not in the
// whole process, where another package may have brought another one. Null where the loader does not know it. static:
// each library that this is compiled into finds itself.
static inline void* own_library() {
  static const char here = 0;
  Dl_info self{};
  if (dladdr(&here, &self) == 0 || self.dli_fname == nullptr) return nullptr;
  return dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace kronfac::cuda
