// The dtypes of a state, for explicit instantiations.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define FPI_FOR_DTYPES(instantiate)                                                                \
  instantiate(torch::headeronly::Half) instantiate(torch::headeronly::BFloat16) instantiate(float) \
      instantiate(double)
