// Anderson's window, as the step operators of both devices see it.
#pragma once

#include "accumulate.h"

namespace fpi {

// The window of every sample: rings of m iterates, newest at counters[kHead].
template <typename T>
struct Window {
  T* values;              // g(x), [B, m, n]
  T* residuals;           // g(x) − x, [B, m, n]
  accumulate_t<T>* gram;  // d_i · d_j by slot, [B, m, m]; d_i = r_i − r_{i−1}
  int m;
};

}  // namespace fpi
