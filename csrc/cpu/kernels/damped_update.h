#pragma once

#include <cstdint>

#include "../capability.h"

// x[i] <- x[i] + beta (gx[i] - x[i]) for i in [0, count)
FPI_CPU_KERNEL(template <typename T>
               void damped_update(T* x, const T* gx, double beta, int64_t count));
