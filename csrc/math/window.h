// Anderson's windows, as the kernels of both devices see them.
#pragma once

#include "accumulate.h"

namespace fpi {

// A ring of m iterates for every sample, or for every row where samples take turns in the rows;
// newest at counters[kHead].
template <typename T>
struct Window {
  T* values;              // g(x), [B or R, m, n]
  T* residuals;           // g(x) − x, [B or R, m, n]
  accumulate_t<T>* gram;  // d_i · d_j by slot, [B or R, m, m]; d_i = r_i − r_{i−1}
  int m;
  bool by_row = false;

  FPI_HOST_DEVICE int64_t place(int64_t row, int64_t sample) const { return by_row ? row : sample; }
};

// Of a ring of m, the slot whose iterate came `age` before the newest, in slot head.
FPI_HOST_DEVICE int slot_of(int age, int head, int m) {
  return head - age < 0 ? head - age + m : head - age;
}

}  // namespace fpi
