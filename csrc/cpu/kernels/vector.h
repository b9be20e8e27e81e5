// Vectors of the accumulate type, as wide as the instruction set that a file is compiled for.
// The number of lanes fixes the order of every sum, so it depends on dtype and machine alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../math/accumulate.h"
#include "../../math/norm.h"
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

template <typename Pointer>
using value_t = std::remove_cv_t<std::remove_pointer_t<Pointer>>;

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

// The lower or the upper halves of a's and b's groups of kWidth lanes, a's and b's in turns.
template <typename Acc, int kWidth, bool kUpper>
FPI_HOST_DEVICE Vector<Acc> halves(Vector<Acc> a, Vector<Acc> b) {
  typedef std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t> Lane;
  typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
  constexpr int kHalf = kWidth / 2;
  Lanes from = {};
  for (int l = 0; l < kLanes<Acc>; ++l) {
    const int group = l / kWidth, from_b = l % kWidth / kHalf;
    from[l] = group * kWidth + kUpper * kHalf + l % kHalf + from_b * kLanes<Acc>;
  }
  return __builtin_shuffle(a, b, from);
}

// Adds the upper halves of groups of kWidth lanes to the lower ones, until a group is one lane. Two
// vectors become one in each step, so that many sums cost little more than one.
template <typename Acc, int kCount, int kWidth = kLanes<Acc>>
FPI_HOST_DEVICE void fold(Vector<Acc>* v) {
  if constexpr (kWidth > 1) {
    constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
    for (int i = 0; i < kLeft; ++i) {
      const Vector<Acc> other = v[i + kCount / 2];
      v[i] = halves<Acc, kWidth, false>(v[i], other) + halves<Acc, kWidth, true>(v[i], other);
    }
    fold<Acc, kLeft, kWidth / 2>(v);
  }
}

// out[i]: the sum of v[i]'s lanes, in a tree of fixed shape. kCount is a power of two; v is spent.
template <int kCount, typename Acc>
FPI_HOST_DEVICE void sums(Vector<Acc>* v, Acc* out) {
  constexpr int kLeft = kCount > kLanes<Acc> ? kCount / kLanes<Acc> : 1;
  constexpr int kStride = kCount < kLanes<Acc> ? kLanes<Acc> / kCount : 1;
  fold<Acc, kCount>(v);
  for (int i = 0; i < kCount; ++i) {
    out[i] = v[i % kLeft][i / kLeft * kStride];
  }
}

// Runs body(i, load, store) over [0, n) a vector at a time, the last one partial. Loads and stores
// take pointers to T and to Acc.
template <typename T, typename Acc = accumulate_t<T>, typename Body>
FPI_HOST_DEVICE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) {
    body(
        i,
        [](const auto* p)
            __attribute__((always_inline)) { return load<value_t<decltype(p)>, Acc>(p); },
        [](auto* p, Vector<Acc> v)
            __attribute__((always_inline)) { store<value_t<decltype(p)>, Acc>(p, v); });
  }
  if (i < n) {
    const int64_t count = n - i;
    body(
        i,
        [count](const auto* p) __attribute__((always_inline)) {
          return load_tail<value_t<decltype(p)>, Acc>(p, count);
        },
        [count](auto* p, Vector<Acc> v)
            __attribute__((always_inline)) { store_tail<value_t<decltype(p)>, Acc>(p, v, count); });
  }
}

// See norm_of; value(i, load) gives entries i and on. The sums are those of a kernel's own loop.
// Seldom called: what a kernel does in every row keeps its registers.
template <typename T, typename Acc, typename Value>
__attribute__((noinline)) Acc norm_anew(Acc squares, int64_t n, const Value& value) {
  const auto largest = [&] {
    Acc most = 0;
    for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
      const Vector<Acc> entries = value(i, load);
      for (int l = 0; l < kLanes<Acc>; ++l) {
        most = Larger{}(most, entries[l] < 0 ? -entries[l] : entries[l]);
      }
    });
    return most;
  };
  return norm_of(squares, largest, [&](Acc scale) {
    Vector<Acc> sum[1] = {};
    for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
      const Vector<Acc> scaled = scale * value(i, load);
      sum[0] += scaled * scaled;
    });
    Acc total;
    sums<1>(sum, &total);
    return total;
  });
}

template <typename T, typename Acc, typename Value>
FPI_HOST_DEVICE Acc norm_from(Acc squares, int64_t n, const Value& value) {
  return is_trusted(squares) ? square_root(squares) : norm_anew<T>(squares, n, value);
}

}  // namespace fpi::FPI_CPU_NAMESPACE
