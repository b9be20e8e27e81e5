// How the step operators launch their kernels: stream, scratch memory and the arguments they share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "../checks.h"
#include "kernels/rows.cuh"

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

// A step of x's rows, with the scratch memory that holds what its blocks tell each other.
template <typename T>
class Launch {
 public:
  using Acc = accumulate_t<T>;

  // m: Anderson's history, 1 if none. sums: of a row. vectors: tensors of n values a row, beside x,
  // gx and out.
  Launch(const StepArguments& a, int sums, int m, std::initializer_list<Tensor> vectors)
      : stream_(current_stream(a.x)) {
    const int64_t rows = a.x.size(0), n = a.x.size(1);
    const Plan plan = plan_of(n, sizeof(T));
    const Desk desk = desk_of(plan, n, sizeof(T), sizeof(Acc), sums, m);
    const Scratch scratch = scratch_of(plan, rows, sizeof(Acc), sums, m);
    memory_ = torch::stable::new_empty(a.x, {scratch.bytes}, torch::headeronly::ScalarType::Byte);
    char* memory = static_cast<char*>(memory_.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, scratch.zeroed, stream_));

    bool aligned = n % kWidth<T> == 0;
    const auto check = [&](const Tensor& v) {
      aligned = aligned && reinterpret_cast<std::uintptr_t>(v.const_data_ptr()) % kPackBytes == 0;
    };
    check(a.x), check(a.gx), check(a.out);
    for (const Tensor& v : vectors) {
      check(v);
    }
    step_ = {
        static_cast<T*>(a.x.mutable_data_ptr()),
        static_cast<const T*>(a.gx.const_data_ptr()),
        static_cast<T*>(a.out.mutable_data_ptr()),
        rows,
        n,
        static_cast<Acc>(a.beta),
        {static_cast<int32_t*>(a.counters.mutable_data_ptr()),
         static_cast<Acc*>(a.scalars.mutable_data_ptr()),
         a.floor ? static_cast<const Acc*>(a.floor->const_data_ptr()) : nullptr,
         a.index ? static_cast<const int64_t*>(a.index->const_data_ptr()) : nullptr,
         {static_cast<Acc>(a.rtol), static_cast<Acc>(a.offset), static_cast<Acc>(a.rounding),
          static_cast<int32_t>(a.patience), static_cast<int32_t>(a.max_iterations)},
         0},
        static_cast<int32_t*>(a.tally.mutable_data_ptr()),
        aligned,
        plan,
        desk,
        sums,
        reinterpret_cast<int32_t*>(memory),
        reinterpret_cast<int32_t*>(memory + scratch.arrivals),
        reinterpret_cast<Move*>(memory + scratch.moves),
        reinterpret_cast<Acc*>(memory + scratch.gamma),
        reinterpret_cast<Acc*>(memory + scratch.partials),
    };
  }

  const Step<T>& step() const { return step_; }

  // The first launch is all there is unless several blocks share a row.
  template <typename First, typename Second>
  void run(const First& first, const Second& second) const {
    const int64_t blocks = blocks_of(step_.plan, step_.rows);
    launch(first, blocks, shared_bytes(step_.plan, step_.desk), stream_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (step_.plan.parts > 1 && step_.rows > 0) {
      launch(second, blocks, 0, stream_);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

 private:
  cudaStream_t stream_;
  Tensor memory_;  // back to the stream's pool with this object; the kernels run in its order
  Step<T> step_;
};

}  // namespace fpi::cuda
