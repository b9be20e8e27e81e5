// Updates of the iterate, one value at a time.
#pragma once

#include "norm.h"

namespace fpi {

// x + beta (g(x) - x): beta weighs the new value; 1 is undamped and gives g(x) to the bit. So does
// a beta above 1 where the sum would overflow the state's type: a plain iterate is finite as g is.
template <typename T, typename Acc>
FPI_HOST_DEVICE T damped_update(T x, T gx, Acc beta) {
  const Acc old = static_cast<Acc>(x);
  const T moved = static_cast<T>(old + beta * (static_cast<Acc>(gx) - old));
  return beta == Acc(1) || !is_finite(static_cast<Acc>(moved)) ? gx : moved;
}

}  // namespace fpi
