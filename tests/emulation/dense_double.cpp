#include "dense.h"

namespace fpi::cuda {

static const DenseOperators<double> float64("float64");

}  // namespace fpi::cuda
