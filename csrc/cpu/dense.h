// Packed weights of dense layers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../operators.h"
#include "kernels/dense_map.h"

namespace fpi {

// So many bytes; undefined values.
inline Tensor memory_like(const Tensor& x, int64_t bytes) {
  const int64_t size[] = {bytes};
  return torch::stable::new_empty(x, size, torch::headeronly::ScalarType::Byte);
}

template <typename T>
class PackedWeights {
 public:
  using Acc = accumulate_t<T>;

  PackedWeights(const Tensor& like, const DenseLayer<T>& layer) {
    const int64_t panels = FPI_CPU_DISPATCH(dense_panels<T>)(layer);
    const int64_t values = FPI_CPU_DISPATCH(dense_panel_values<T>)(layer);
    memory_ = memory_like(like, panels * values * static_cast<int64_t>(sizeof(Acc)));
    const auto kernel = FPI_CPU_DISPATCH(dense_pack<T>);
    constexpr int64_t kGrain = 32768;  // values; a thread costs more than it saves below
    torch::stable::parallel_for(
        0, panels, kGrain / (values > 0 ? values : 1) + 1,
        [&](int64_t begin, int64_t end) { kernel(layer, data(), begin, end); });
  }

  Acc* data() const { return static_cast<Acc*>(memory_.mutable_data_ptr()); }

 private:
  Tensor memory_;
};

}  // namespace fpi
