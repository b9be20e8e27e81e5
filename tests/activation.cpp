// csrc/math/activation.h as C functions over arrays, for tests/test_activation.py. The vectors are
// as wide as the instruction set's, and n is a multiple of their lanes.
#include "../csrc/math/activation.h"

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <fpi::Activation kActivation, typename V, typename T>
void each(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += sizeof(V) / sizeof(T)) {
    V v;
    memcpy(&v, x + i, sizeof v);
    v = fpi::activate<kActivation>(v);
    memcpy(y + i, &v, sizeof v);
  }
}

}  // namespace

#define FUNCTIONS_OF(name, activation, T)                            \
  extern "C" void name##_##T##_scalar(const T* x, T* y, int64_t n) { \
    each<fpi::activation, T>(x, y, n);                               \
  }                                                                  \
  extern "C" void name##_##T##_vector(const T* x, T* y, int64_t n) { \
    each<fpi::activation, VectorOf<T>::type>(x, y, n);               \
  }
#define FUNCTIONS(name, activation)     \
  FUNCTIONS_OF(name, activation, float) \
  FUNCTIONS_OF(name, activation, double)

FUNCTIONS(identity, kIdentity)
FUNCTIONS(tanh, kTanh)
FUNCTIONS(relu, kRelu)
FUNCTIONS(sigmoid, kSigmoid)
FUNCTIONS(softplus, kSoftplus)
FUNCTIONS(gelu, kGelu)
