#pragma once

#include <cstdint>

#include "../../math/accumulate.h"
#include "../../math/progress.h"
#include "../../math/window.h"
#include "../capability.h"

// One damped Picard step of rows [begin, end) of x and gx, [R, n]; returns what came of them.
FPI_CPU_KERNEL(template <typename T> Tally picard_step(T* x, const T* gx, T* out, int64_t n,
                                                       double beta, const Trail<T>& trail,
                                                       const Record<accumulate_t<T>>& record,
                                                       int64_t begin, int64_t end));
