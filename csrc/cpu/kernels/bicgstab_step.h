#pragma once

#include <cstdint>

#include "../../math/bicgstab.h"
#include "../capability.h"

// What BiCGSTAB makes of one product, in rows [begin, end) of x and gx, [R, n]; returns what came
// of them.
FPI_CPU_KERNEL(template <typename T> Tally bicgstab_step(T* x, const T* gx, T* out, int64_t n,
                                                         const Krylov<T>& krylov,
                                                         const Record<accumulate_t<T>>& record,
                                                         int64_t begin, int64_t end));
