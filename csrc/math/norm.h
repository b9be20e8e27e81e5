// Norms, from a sum of squares where that can be trusted.
#pragma once

#include <math.h>

#include "macros.h"

namespace fpi {

// Of a vector: a mask, lane by lane.
template <typename V>
FPI_HOST_DEVICE auto is_finite(V a) {
  return a - a == V{};
}

FPI_HOST_DEVICE float square_root(float a) { return sqrtf(a); }
FPI_HOST_DEVICE double square_root(double a) { return sqrt(a); }

struct Add {
  template <typename Acc>
  FPI_HOST_DEVICE Acc operator()(Acc a, Acc b) const {
    return a + b;
  }
};

struct Larger {  // the first that is not finite is larger than any number
  template <typename Acc>
  FPI_HOST_DEVICE Acc operator()(Acc a, Acc b) const {
    return !is_finite(a) || b <= a ? a : b;
  }
};

// Whether a sum of squares neither under- nor overflowed, nor lost much of it.
template <typename Acc>
FPI_HOST_DEVICE bool is_trusted(Acc squares) {
  const Acc tiny = sizeof(Acc) == 4 ? Acc(1e-30) : Acc(1e-290);
  const Acc huge = sizeof(Acc) == 4 ? Acc(1e30) : Acc(1e290);
  return squares > tiny && squares < huge;
}

// √squares where that is trusted; else the norm again, scaled by the largest entry, so that tiny
// and huge states are measured too. reduce(term, join) joins term(entry) of all entries.
template <typename Acc, typename Reduce>
FPI_HOST_DEVICE Acc norm_of(Acc squares, const Reduce& reduce) {
  if (is_trusted(squares)) {
    return square_root(squares);
  }
  const Acc largest = reduce([](Acc entry) { return entry < 0 ? -entry : entry; }, Larger{});
  if (!is_finite(largest) || largest == Acc(0)) {
    return largest;
  }
  const auto square = [&](Acc entry) {
    const Acc scaled = entry / largest;
    return scaled * scaled;
  };
  return largest * square_root(reduce(square, Add{}));
}

}  // namespace fpi
