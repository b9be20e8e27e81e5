#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "dense.h"

namespace fpi::cuda {

static const DenseOperators<torch::headeronly::Half> float16("float16");
static const DenseOperators<torch::headeronly::BFloat16> bfloat16("bfloat16");

}  // namespace fpi::cuda
