// How the step operators launch their kernels: stream, scratch memory and the arguments they share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>

#include "../checks.h"
#include "layout.h"

namespace fpi::cuda {

// What both operators take, in the order of their schemas.
struct StepArguments {
  const Tensor &x, &gx, &out, &counters, &scalars, &tally;
  const std::optional<Tensor>&index, &floor;
  double rtol, offset, rounding;
  int64_t patience, max_iterations;
  double beta;
};

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

  // vectors: tensors of n values a row beside x, gx and out.
  Launch(const StepArguments& a, int sums, int m, std::initializer_list<const T*> vectors)
      : stream_(current_stream(a.x)), layout_(a.x.size(0), a.x.size(1), sums, m) {
    const int64_t size[] = {layout_.scratch.bytes};
    memory_ = torch::stable::new_empty(a.x, size, torch::headeronly::ScalarType::Byte);
    auto* memory = static_cast<unsigned char*>(memory_.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, layout_.scratch.zeroed, stream_));
    const Record<Acc> record = {
        static_cast<int32_t*>(a.counters.mutable_data_ptr()),
        static_cast<Acc*>(a.scalars.mutable_data_ptr()),
        a.floor ? static_cast<const Acc*>(a.floor->const_data_ptr()) : nullptr,
        a.index ? static_cast<const int64_t*>(a.index->const_data_ptr()) : nullptr,
        {static_cast<Acc>(a.rtol), static_cast<Acc>(a.offset), static_cast<Acc>(a.rounding),
         static_cast<int32_t>(a.patience), static_cast<int32_t>(a.max_iterations)}};
    step_ = layout_.step(
        static_cast<T*>(a.x.mutable_data_ptr()), static_cast<const T*>(a.gx.const_data_ptr()),
        static_cast<T*>(a.out.mutable_data_ptr()), static_cast<Acc>(a.beta), record,
        static_cast<int32_t*>(a.tally.mutable_data_ptr()), memory, vectors);
  }

  const Step<T>& step() const { return step_; }

  template <typename First, typename Second>
  void run(const First& first, const Second& second) const {
    layout_.run(first, second, Start{stream_});
  }

 private:
  cudaStream_t stream_;
  Layout<T> layout_;
  Tensor memory_;  // back to the stream's pool with this object; the kernels run in its order
  Step<T> step_;
};

}  // namespace fpi::cuda
