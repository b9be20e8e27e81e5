#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

#include "../checks.h"
#include "../dispatch.h"
#include "../math/accumulate.h"
#include "../math/update.h"

namespace fpi {
namespace {

constexpr int kThreads = 256;
// A grid-stride loop: enough blocks to fill any device, few enough to be worth launching.
constexpr int64_t kMaxBlocks = 4096;

// Values that one thread reads and writes at once; 16 bytes is the widest access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// x[i] <- x[i] + beta (gx[i] - x[i]), kWidth values at a time; count is in packs
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    damped_update_kernel(T* x, const T* gx, accumulate_t<T> beta, int64_t count) {
  using Acc = accumulate_t<T>;
  using Values = Pack<T, kWidth>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    Values old = reinterpret_cast<const Values*>(x)[i];
    const Values next = reinterpret_cast<const Values*>(gx)[i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      old.values[k] = static_cast<T>(
          damped_update(static_cast<Acc>(old.values[k]), static_cast<Acc>(next.values[k]), beta));
    }
    reinterpret_cast<Values*>(x)[i] = old;
  }
}

template <typename T, int kWidth>
void launch(T* x, const T* gx, double beta, int64_t count, cudaStream_t stream) {
  if (count == 0) {
    return;  // a grid of no blocks is a launch error
  }
  const int64_t wanted = (count + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  damped_update_kernel<T, kWidth>
      <<<blocks, kThreads, 0, stream>>>(x, gx, static_cast<accumulate_t<T>>(beta), count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void damped_update_cuda(Tensor& x, const Tensor& gx, double beta) {
  check_damped_update(x, gx);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream_handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_handle));
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  dispatch_floating("_damped_update", "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = 16 / sizeof(T);
    T* x_data = static_cast<T*>(x.mutable_data_ptr());
    const T* gx_data = static_cast<const T*>(gx.const_data_ptr());
    const int64_t count = x.numel();
    const auto address =
        reinterpret_cast<std::uintptr_t>(x_data) | reinterpret_cast<std::uintptr_t>(gx_data);
    // A view that starts between 16-byte boundaries goes value by value, and so does the tail.
    const int64_t packed = address % 16 == 0 ? count / kWidth * kWidth : 0;
    launch<T, kWidth>(x_data, gx_data, beta, packed / kWidth, stream);
    launch<T, 1>(x_data + packed, gx_data + packed, beta, count - packed, stream);
  });
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_damped_update", TORCH_BOX(&fpi::damped_update_cuda));
}
