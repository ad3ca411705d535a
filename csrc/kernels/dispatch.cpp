// Which instruction set's kernels run: chosen once, when the first operator or the host module asks.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace kronfac::kernels {
namespace {

struct Choice {
  const char* name;
  const Table* table;  // nullptr: this build has no kernels for it
  bool supported;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// Whether there are bfloat16 tiles and the operating system lets this process use them: their state is large, so that
// Linux wants to be asked.
bool has_amx() {
#if defined(__linux__)
  unsigned int a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned int bfloat16_tiles = 1u << 22 | 1u << 24;  // AMX-BF16 and AMX-TILE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bfloat16_tiles) != bfloat16_tiles) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// The last supported one is the default.
struct Choices {
  Choice list[4] = {{kTableNames[0], &portable::table, true},
                    {kTableNames[1], nullptr, false},
                    {kTableNames[2], nullptr, false},
                    {kTableNames[3], nullptr, false}};
  static_assert(sizeof(list) / sizeof(Choice) == sizeof(kTableNames) / sizeof(*kTableNames));
  Choices() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    list[1].supported = has_avx2();
    list[2].supported = has_avx512();
    list[3].supported = has_avx512() && has_amx();
#endif
#ifdef KRONFAC_HAVE_AVX2
    list[1].table = &avx2::table;
#endif
#ifdef KRONFAC_HAVE_AVX512
    list[2].table = &avx512::table;
#endif
#ifdef KRONFAC_HAVE_AMX
    list[3].table = &amx::table;
#endif
  }
};

const Choices& choices() {
  static const Choices all;
  return all;
}

bool usable(const Choice& choice) { return choice.table != nullptr && choice.supported; }

std::string usable_names() {
  std::string names;
  for (const Choice& choice : choices().list) {
    if (usable(choice)) names += (names.empty() ? "" : ", ") + std::string(choice.name);
  }
  return names;
}

const Table& choose() {
  const char* wanted = std::getenv("KRONFAC_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    const Table* widest = &portable::table;
    for (const Choice& choice : choices().list) {
      if (usable(choice)) widest = choice.table;
    }
    return *widest;
  }
  if (const Table* found = find_table(wanted)) return *found;
  throw std::runtime_error(
      "kronfac: KRONFAC_ISA: expected one of the instruction sets that this machine and this build have (" +
      usable_names() + "), got '" + wanted + "'; correct the variable or unset it");
}

}  // namespace

const Table* find_table(const char* name) {
  for (const Choice& choice : choices().list) {
    if (std::strcmp(choice.name, name) == 0 && usable(choice)) return choice.table;
  }
  return nullptr;
}

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

}  // namespace kronfac::kernels
