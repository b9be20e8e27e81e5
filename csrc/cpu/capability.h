// Instruction sets of the CPU kernels. The files of csrc/cpu/kernels/ are compiled once for each,
// and the best one that the machine has is chosen when the library is loaded.
//
//   kernels/op.h    FPI_CPU_KERNEL(template <typename T> void op_rows(T* x, int64_t n));
//   kernels/op.cpp  namespace fpi::FPI_CPU_NAMESPACE { ... its definition, in plain loops ... }
//   op.cpp          checks, then FPI_CPU_DISPATCH(op_rows<T>)(x, n) under parallel_for
//
// Kernels take pointers, and use of torch and std only what the compiler inlines: an inline
// function left standing is merged by the linker with the same one of other files, and a plain CPU
// could be given the AVX-512 one. tests/test_packaging.py looks at the symbols.
#pragma once

#include <vector>

#define FPI_CONCAT_(a, b) a##b
#define FPI_CONCAT(a, b) FPI_CONCAT_(a, b)
#define FPI_CPU_NAMESPACE FPI_CONCAT(cpu_, FPI_CPU_CAPABILITY)

#ifdef FPI_CPU_X86
#define FPI_CPU_KERNEL(...) \
  namespace fpi {           \
  namespace cpu_default {   \
  __VA_ARGS__;              \
  }                         \
  namespace cpu_avx2 {      \
  __VA_ARGS__;              \
  }                         \
  namespace cpu_avx512 {    \
  __VA_ARGS__;              \
  }                         \
  }                         \
  static_assert(true)
#define FPI_CPU_DISPATCH(...)                                                         \
  ::fpi::cpu::choose(&::fpi::cpu_default::__VA_ARGS__, &::fpi::cpu_avx2::__VA_ARGS__, \
                     &::fpi::cpu_avx512::__VA_ARGS__)
#else
#define FPI_CPU_KERNEL(...)    \
  namespace fpi::cpu_default { \
  __VA_ARGS__;                 \
  }                            \
  static_assert(true)
#define FPI_CPU_DISPATCH(...) (&::fpi::cpu_default::__VA_ARGS__)
#endif

namespace fpi::cpu {

enum class Capability { Default, Avx2, Avx512 };

const char* name(Capability capability);

// What this machine can run, lowest first.
std::vector<Capability> available();

// The one in use: the best available, or the lower one that the environment variable
// FPI_CPU_CAPABILITY names. Throws if it names one that is not available.
Capability capability();

template <typename Kernel>
Kernel* choose(Kernel* for_default, Kernel* for_avx2, Kernel* for_avx512) {
  Kernel* const kernels[] = {for_default, for_avx2, for_avx512};
  return kernels[static_cast<int>(capability())];
}

}  // namespace fpi::cpu
