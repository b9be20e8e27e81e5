// Updates of the iterate, one value at a time.
#pragma once

#include "macros.h"

namespace fpi {

// x + beta (g(x) - x): beta weighs the new value; 1 is undamped and gives g(x) to the bit.
template <typename Acc>
FPI_HOST_DEVICE Acc damped_update(Acc x, Acc gx, Acc beta) {
  return beta == Acc(1) ? gx : x + beta * (gx - x);
}

}  // namespace fpi
