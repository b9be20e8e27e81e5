// What the solvers remember of a sample's iterates, as the kernels of both devices see it.
#pragma once

#include "accumulate.h"

namespace fpi {

// Anderson's: a ring of m iterates for every sample, or for every row where samples take turns in
// the rows; newest at counters[kHead].
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

// Picard's: the last two iterates, newest at counters[kHead], as far as they were kept
// (math/picard.h).
constexpr int kTrailLength = 2;

template <typename T>
struct Trail {
  T* states;  // x, [B or R, kTrailLength, n]; null: nothing is kept
  bool by_row = false;

  // The iterate in that slot.
  FPI_HOST_DEVICE T* state(int64_t row, int64_t sample, int slot, int64_t n) const {
    return states + ((by_row ? row : sample) * kTrailLength + slot) * n;
  }
};

}  // namespace fpi
