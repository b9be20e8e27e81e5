// From a tensor's dtype to the C++ type of its values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"

namespace fpi {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>{}) with the T of x's values.
template <typename Body>
void dispatch_floating(const char* op, const char* name, const Tensor& x, const Body& body) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  switch (dtype) {
    case ScalarType::Half:
      return body(TypeTag<torch::headeronly::Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<torch::headeronly::BFloat16>{});
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    default:
      FPI_CHECK(false, op, ": ", name, " must be float16, bfloat16, float32 or float64 (got ",
                dtype, ")");
  }
}

}  // namespace fpi
