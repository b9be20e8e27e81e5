#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fpi::cpu {

const char* name(Capability capability) {
  switch (capability) {
    case Capability::Avx2:
      return "avx2";
    case Capability::Avx512:
      return "avx512";
    default:
      return "default";
  }
}

std::vector<Capability> available() {
  std::vector<Capability> found{Capability::Default};
#ifdef FPI_CPU_X86
  // The tests name every flag that CMakeLists.txt gives the compiler.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    found.push_back(Capability::Avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      found.push_back(Capability::Avx512);
    }
  }
#endif
  return found;
}

static Capability choose_capability() {
  const std::vector<Capability> found = available();
  const char* wanted = std::getenv("FPI_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return found.back();
  }
  std::string names;
  for (Capability capability : found) {
    if (std::string(wanted) == name(capability)) {
      return capability;
    }
    names += std::string(names.empty() ? "" : ", ") + name(capability);
  }
  throw std::runtime_error("FPI_CPU_CAPABILITY must be one of " + names + " on this machine (got " +
                           wanted + ")");
}

Capability capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

}  // namespace fpi::cpu
