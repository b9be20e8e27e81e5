// The type in which a state's arithmetic is done: float for float16, bfloat16 and float32, double
// for float64.
#pragma once

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

}  // namespace fpi
