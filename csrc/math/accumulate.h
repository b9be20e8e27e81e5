// The type in which a state's arithmetic is done: float for float16, bfloat16 and float32, double
// for float64.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "macros.h"

namespace fpi {

template <typename T>
struct Accumulate {
  static_assert(sizeof(T) <= sizeof(float), "no accumulate type known for this state type");
  using type = float;
};

template <>
struct Accumulate<double> {
  using type = double;
};

template <typename T>
using accumulate_t = typename Accumulate<T>::type;

// Significand bits of a state type, the hidden one included; its unit roundoff is 2^-bits.
template <typename T>
constexpr int kSignificandBits = 11;  // float16
template <>
inline constexpr int kSignificandBits<torch::headeronly::BFloat16> = 8;
template <>
inline constexpr int kSignificandBits<float> = 24;
template <>
inline constexpr int kSignificandBits<double> = 53;

template <typename T>
FPI_HOST_DEVICE constexpr accumulate_t<T> unit_roundoff() {
  return accumulate_t<T>(1) / (int64_t{1} << kSignificandBits<T>);
}

}  // namespace fpi
