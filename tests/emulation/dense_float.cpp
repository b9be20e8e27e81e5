#include "dense.h"

namespace fpi::cuda {

static const DenseOperators<float> float32("float32");

}  // namespace fpi::cuda
