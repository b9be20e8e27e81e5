// Vectors of the accumulate type, as wide as the instruction set that a file is compiled for.
// The number of lanes fixes the order of every sum, so it depends on dtype and machine alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../math/accumulate.h"
#include "../../math/progress.h"
#include "../capability.h"

namespace fpi::FPI_CPU_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Acc>
struct VectorOf {
  typedef Acc type __attribute__((vector_size(kVectorBytes)));
};
template <typename Acc>
using Vector = typename VectorOf<Acc>::type;
template <typename Acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

template <typename T, typename Acc = accumulate_t<T>>
FPI_HOST_DEVICE Vector<Acc> load(const T* p) {
  Vector<Acc> v;
  if constexpr (sizeof(T) == sizeof(Acc)) {
    memcpy(&v, p, sizeof v);
  } else {
    for (int l = 0; l < kLanes<Acc>; ++l) {
      v[l] = static_cast<Acc>(p[l]);
    }
  }
  return v;
}

// The first count values, zeros behind them.
template <typename T, typename Acc = accumulate_t<T>>
FPI_HOST_DEVICE Vector<Acc> load_tail(const T* p, int64_t count) {
  Vector<Acc> v = {};
  for (int64_t l = 0; l < count; ++l) {
    v[l] = static_cast<Acc>(p[l]);
  }
  return v;
}

template <typename T, typename Acc = accumulate_t<T>>
FPI_HOST_DEVICE void store(T* p, Vector<Acc> v) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    memcpy(p, &v, sizeof v);
  } else {
    for (int l = 0; l < kLanes<Acc>; ++l) {
      p[l] = static_cast<T>(v[l]);
    }
  }
}

template <typename T, typename Acc = accumulate_t<T>>
FPI_HOST_DEVICE void store_tail(T* p, Vector<Acc> v, int64_t count) {
  for (int64_t l = 0; l < count; ++l) {
    p[l] = static_cast<T>(v[l]);
  }
}

// Lanes in a tree of fixed shape: the upper half onto the lower, until one is left.
template <typename Acc, int kHalf = kLanes<Acc> / 2>
FPI_HOST_DEVICE Acc sum(Vector<Acc> v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    typedef std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t> Lane;
    typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
    Lanes upper = {};
    for (int l = 0; l < kLanes<Acc>; ++l) {
      upper[l] = (l + kHalf) % kLanes<Acc>;
    }
    return sum<Acc, kHalf / 2>(v + __builtin_shuffle(v, upper));
  }
}

// Runs body(i, load, store) over [0, n) a vector at a time, the last one partial.
template <typename T, typename Body>
FPI_HOST_DEVICE void for_vectors(int64_t n, const Body& body) {
  using Acc = accumulate_t<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) {
    body(
        i, [](const T* p) __attribute__((always_inline)) { return load<T>(p); },
        [](T* p, Vector<Acc> v) __attribute__((always_inline)) { store<T>(p, v); });
  }
  if (i < n) {
    const int64_t count = n - i;
    body(
        i, [count](const T* p) __attribute__((always_inline)) { return load_tail<T>(p, count); },
        [count](T* p, Vector<Acc> v)
            __attribute__((always_inline)) { store_tail<T>(p, v, count); });
  }
}

// √squares where that sum of squares is trusted; else the norm again, scaled by the largest entry,
// so that tiny and huge states are measured too. value(i) gives entry i.
template <typename Acc, typename Value>
FPI_HOST_DEVICE Acc norm_from(Acc squares, int64_t n, const Value& value) {
  const Acc tiny = sizeof(Acc) == 4 ? Acc(1e-30) : Acc(1e-290);
  const Acc huge = sizeof(Acc) == 4 ? Acc(1e30) : Acc(1e290);
  if (squares > tiny && squares < huge) {
    return square_root(squares);
  }
  Acc largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc a = value(i) < 0 ? -value(i) : value(i);
    if (!is_finite(a)) {
      return a;
    }
    largest = a > largest ? a : largest;
  }
  if (largest == Acc(0)) {
    return largest;
  }
  Acc scaled = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc a = value(i) / largest;
    scaled += a * a;
  }
  return largest * square_root(scaled);
}

}  // namespace fpi::FPI_CPU_NAMESPACE
