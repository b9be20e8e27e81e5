// Norms, from a sum of squares where that can be trusted, and powers of two to scale by where not.
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

// Whether a sum of squares neither under- nor overflowed, nor lost anything that its last bit could
// show: squares that are no normal numbers add up to much less than that.
template <typename Acc>
FPI_HOST_DEVICE bool is_trusted(Acc squares) {
  const Acc tiny = sizeof(Acc) == 4 ? Acc(0x1p-80) : Acc(0x1p-900);
  const Acc huge = sizeof(Acc) == 4 ? Acc(0x1p100) : Acc(0x1p1000);
  return (squares > tiny) & (squares < huge);
}

// The power of two by which a finite largest ≠ 0 comes near 1; like its inverse a normal number, so
// that to multiply by it rounds nothing. Sums of scaled squares are the unscaled ones to the bit,
// but for the exponent, wherever both can be formed: that makes a solve free of the state's scale.
FPI_HOST_DEVICE float scale_for(float largest) {
  const int e = ilogbf(largest);
  return scalbnf(1.0f, e < -126 ? 126 : e > 126 ? -126 : -e);
}
FPI_HOST_DEVICE double scale_for(double largest) {
  const int e = ilogb(largest);
  return scalbn(1.0, e < -1022 ? 1022 : e > 1022 ? -1022 : -e);
}

// √squares where that is trusted; else the norm again, with the entries scaled, so that tiny and
// huge states are measured too. largest() is the largest |entry|, the first that is not finite if
// there is one; squares_by(scale) is the sum of the squares of scale · entry.
template <typename Acc, typename Largest, typename SquaresBy>
FPI_HOST_DEVICE Acc norm_of(Acc squares, const Largest& largest, const SquaresBy& squares_by) {
  if (is_trusted(squares)) {
    return square_root(squares);
  }
  const Acc most = largest();
  if (!is_finite(most) || most == Acc(0)) {
    return most;
  }
  const Acc scale = scale_for(most);
  return square_root(squares_by(scale)) / scale;
}

}  // namespace fpi
