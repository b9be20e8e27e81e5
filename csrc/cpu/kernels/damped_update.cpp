#include "damped_update.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../math/accumulate.h"
#include "../../math/update.h"

namespace fpi::FPI_CPU_NAMESPACE {

template <typename T>
void damped_update(T* x, const T* gx, double beta, int64_t count) {
  using Acc = accumulate_t<T>;
  const Acc weight = static_cast<Acc>(beta);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = fpi::damped_update(static_cast<Acc>(x[i]), static_cast<Acc>(gx[i]), weight);
  }
}

template void damped_update(torch::headeronly::Half*, const torch::headeronly::Half*, double,
                            int64_t);
template void damped_update(torch::headeronly::BFloat16*, const torch::headeronly::BFloat16*,
                            double, int64_t);
template void damped_update(float*, const float*, double, int64_t);
template void damped_update(double*, const double*, double, int64_t);

}  // namespace fpi::FPI_CPU_NAMESPACE
