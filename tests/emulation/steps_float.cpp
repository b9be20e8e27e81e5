#include "steps.h"

namespace fpi::cuda {

static const StepOperators<double> float64("float64");
static const StepOperators<float> float32("float32");

}  // namespace fpi::cuda
