// How the step operators launch their kernels: stream, scratch memory and the arguments they share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>

#include "../operators.h"
#include "layout.h"

namespace fpi::cuda {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Start {
  cudaStream_t stream;

  template <typename Body>
  void operator()(const Body& body, int64_t blocks, size_t shared_bytes) const {
    launch(body, blocks, shared_bytes, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// A step of x's rows on the current stream, with its scratch memory.
template <typename T>
class Launch {
 public:
  using Acc = accumulate_t<T>;

  // vectors: those of n values a row that the step touches beside x, gx and out.
  Launch(const Tensor& x, const StepCall<T>& call, int sums, int m,
         std::initializer_list<const T*> vectors)
      : guard_(x.get_device_index()),
        stream_(current_stream(x)),
        layout_(call.rows, call.n, sums, m) {
    const int64_t size[] = {layout_.scratch.bytes};
    memory_ = torch::stable::new_empty(x, size, torch::headeronly::ScalarType::Byte);
    auto* memory = static_cast<unsigned char*>(memory_.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, layout_.scratch.zeroed, stream_));
    batch_ = layout_.batch(call.x, call.gx, call.out, static_cast<Acc>(call.beta), call.record,
                           call.tally, memory, vectors);
  }

  const Batch<T>& batch() const { return batch_; }

  template <typename First, typename Second>
  void run(const First& first, const Second& second) const {
    layout_.run(first, second, Start{stream_});
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  Layout<T> layout_;
  Tensor memory_;  // back to the stream's pool with this object; the kernels run in its order
  Batch<T> batch_;
};

}  // namespace fpi::cuda
