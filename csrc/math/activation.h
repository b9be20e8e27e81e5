// Stand-in until the fitted formulas land: right, and slow.
#pragma once

#include <math.h>

#include <type_traits>

#include "macros.h"

namespace fpi {

// In Python's order.
enum Activation : int { kIdentity, kTanh, kRelu, kSigmoid, kSoftplus, kGelu, kActivations };

template <Activation kActivation, typename V>
FPI_HOST_DEVICE V activate(V x) {
  if constexpr (!std::is_floating_point_v<V>) {
    for (int l = 0; l < static_cast<int>(sizeof(V) / sizeof(x[0])); ++l) {
      x[l] = activate<kActivation>(+x[l]);
    }
    return x;
  } else {
    const double a = static_cast<double>(x);
    if constexpr (kActivation == kTanh) {
      return static_cast<V>(tanh(a));
    } else if constexpr (kActivation == kRelu) {
      return x < V(0) ? V(0) : x;
    } else if constexpr (kActivation == kSigmoid) {
      return static_cast<V>(a < 0 ? exp(a) / (1 + exp(a)) : 1 / (1 + exp(-a)));
    } else if constexpr (kActivation == kSoftplus) {
      return static_cast<V>((a > 0 ? a : 0) + log1p(exp(a > 0 ? -a : a)));
    } else if constexpr (kActivation == kGelu) {
      return static_cast<V>(0.5 * a * erfc(-0.70710678118654752440 * a));
    } else {
      return x;
    }
  }
}

}  // namespace fpi
