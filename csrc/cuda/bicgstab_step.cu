#include "kernels/bicgstab_step.cuh"

#include <torch/csrc/stable/library.h>

#include "../krylov.h"
#include "step.h"

namespace fpi::cuda {
namespace {

struct BicgstabOnCuda {
  template <typename T>
  static void run(const Tensor& x, const StepCall<T>& call, const Krylov<T>& krylov) {
    // 16-byte packs of T at both: a row of vectors is whole packs where one of x is.
    const auto* vectors = reinterpret_cast<const T*>(krylov.vectors);
    const Launch<T> launch(x, call, kKrylovSums, kKrylovHistory, {krylov.base, vectors});
    launch.run(BicgstabStep<T>{launch.batch(), krylov}, BicgstabMove<T>{launch.batch(), krylov});
  }
};

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_bicgstab_step", TORCH_BOX(&fpi::bicgstab_step<fpi::cuda::BicgstabOnCuda>));
}
