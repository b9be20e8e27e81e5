#include "damped_update.h"

#include "../../math/accumulate.h"
#include "../../math/update.h"
#include "dtypes.h"

namespace fpi::FPI_CPU_NAMESPACE {

template <typename T>
void damped_update(T* x, const T* gx, double beta, int64_t count) {
  using Acc = accumulate_t<T>;
  const Acc weight = static_cast<Acc>(beta);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = fpi::damped_update(static_cast<Acc>(x[i]), static_cast<Acc>(gx[i]), weight);
  }
}

#define FPI_INSTANTIATE(T) template void damped_update(T*, const T*, double, int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
