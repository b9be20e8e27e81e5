#include "kernels/dense_map.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dense.h"
#include "watch.h"

namespace fpi {
namespace {

void dense_map_cpu(Tensor x, Tensor weight, std::optional<Tensor> u, Tensor out, bool tf32) {
  check_dense_map(x, weight, u, out);
  FPI_CHECK(!tf32, "_dense_map: tf32 must be false on the CPU");
  dispatch_floating("_dense_map", "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    const DenseLayer<T> layer = layer_of<T>(weight, u, kIdentity);
    const PackedWeights<T> packed(x, layer);
    const int64_t rows = x.size(0), blocks = (rows + kMapRows - 1) / kMapRows;
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), blocks);
    const int64_t values = kMapRows * layer.in;
    const Tensor memory = memory_like(x, workers * values * static_cast<int64_t>(sizeof(Acc)));
    auto* buffers = static_cast<Acc*>(memory.mutable_data_ptr());
    const auto* x_data = static_cast<const T*>(x.const_data_ptr());
    auto* out_data = static_cast<T*>(out.mutable_data_ptr());
    const auto kernel = FPI_CPU_DISPATCH(dense_map<T>);
    cpu::Watch watch;
    watch.on_workers(workers, [&](int64_t worker) {
      int64_t begin = worker * blocks / workers * kMapRows;
      const int64_t end = std::min((worker + 1) * blocks / workers * kMapRows, rows);
      // Rows for some milliseconds, so that to ask whether to stop costs nothing.
      constexpr int64_t kWork = int64_t{1} << 26;
      const int64_t most =
          (kWork / std::max<int64_t>(layer.in * layer.out, 1) / kMapRows + 1) * kMapRows;
      for (; begin < end && !watch.stopped(); begin += most) {
        kernel(layer, packed.data(), x_data, out_data, buffers + worker * values, begin,
               std::min(begin + most, end));
      }
    });
    watch.check("_dense_map");
  });
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_dense_map", TORCH_BOX(&fpi::dense_map_cpu));
}
