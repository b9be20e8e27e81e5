#include "kernels/picard_step.cuh"

#include <torch/csrc/stable/library.h>

#include "step.h"

namespace fpi::cuda {
namespace {

struct PicardOnCuda {
  template <typename T>
  static void run(const Tensor& x, const StepCall<T>& call, const Trail<T>& trail) {
    const Launch<T> launch(x, call, kPicardSums, 1, {trail.states});
    launch.run(PicardStep<T>{launch.batch(), trail}, PicardMove<T>{launch.batch(), trail});
  }
};

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_picard_step", TORCH_BOX(&fpi::picard_step<fpi::cuda::PicardOnCuda>));
}
