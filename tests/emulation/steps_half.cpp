#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "steps.h"

namespace fpi::cuda {

static const StepOperators<torch::headeronly::Half> float16("float16");
static const StepOperators<torch::headeronly::BFloat16> bfloat16("bfloat16");

}  // namespace fpi::cuda
