// The device of dense_layout.h: its properties, torch's memory and the current stream.
#pragma once

#include <vector>

#include "step.h"

namespace fpi::cuda {

class DenseMachine {
 public:
  explicit DenseMachine(const Tensor& x)
      : x_(x), device_(x.get_device_index()), stream_(current_stream(x)) {}

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  template <typename Body>
  int64_t blocks(int64_t shared_bytes) const {
    int fit = 0;
    STD_CUDA_CHECK(allow_shared<Body>(shared_limit()));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &fit, run<Body>, Body::kThreads, static_cast<size_t>(shared_bytes)));
    return static_cast<int64_t>(fit > 0 ? fit : 1) * multiprocessors();
  }

  unsigned char* memory(int64_t bytes, int64_t zeroed) const {
    const int64_t size[] = {bytes};
    memory_.push_back(torch::stable::new_empty(x_, size, torch::headeronly::ScalarType::Byte));
    auto* begin = static_cast<unsigned char*>(memory_.back().mutable_data_ptr());
    if (zeroed > 0) {
      STD_CUDA_CHECK(cudaMemsetAsync(begin, 0, static_cast<size_t>(zeroed), stream_));
    }
    return begin;
  }

  template <typename Body>
  void start(const Body& body, int64_t blocks, size_t shared_bytes) const {
    Start{stream_}(body, blocks, shared_bytes);
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  const Tensor& x_;
  int device_;
  cudaStream_t stream_;
  mutable std::vector<Tensor> memory_;  // back to the stream's pool with this object
};

}  // namespace fpi::cuda
