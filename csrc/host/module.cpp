// Build facts, CPU features and kernel entries for tests: no torch headers here, so that it imports wherever Python
// does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "host/peak.h"
#include "kernels/table.h"

namespace py = pybind11;

namespace {

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2");
  features["fma"] = __builtin_cpu_supports("fma");
  features["f16c"] = __builtin_cpu_supports("f16c");
  features["avx512f"] = __builtin_cpu_supports("avx512f");
  features["avx512bf16"] = __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  features["neon"] = true;
#endif
  return features;
}

std::map<std::string, std::string> build_facts() {
  return {{"version", KRONFAC_VERSION}, {"compiler", KRONFAC_COMPILER},      {"build_type", KRONFAC_BUILD_TYPE},
          {"flags", KRONFAC_FLAGS},     {"torch", KRONFAC_BUILT_WITH_TORCH}, {"torch_target", KRONFAC_TORCH_TARGET}};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and instruction-set choice of the compiled kernels.";
  m.def("cpu_features", &cpu_features, "Instruction-set extensions of this CPU that the kernels know of.");
  m.def("build_facts", &build_facts, "Compiler, flags and torch version that the libraries were built with.");
  m.def(
      "instruction_set", [] { return std::string(kronfac::kernels::table().name); },
      "Name of the instruction set in use (KRONFAC_ISA overrides).");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const char* name : kronfac::kernels::kTableNames) {
          if (kronfac::kernels::find_table(name) != nullptr) names.emplace_back(name);
        }
        return names;
      },
      "Instruction sets compiled in that this CPU can run, from the plainest to the widest.");
  kronfac::host::define_peak(m);
}
