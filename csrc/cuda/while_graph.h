// A loop that the device itself ends: three captured graphs as one launch,
//   prepare, then WHILE (rows are active and iterations left) { body }, then finish.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fpi::cuda {

// Owns the graph it builds and its executable form. The three graphs are copied into it as child
// nodes; the memory that their kernels use stays the caller's to keep.
class WhileGraph {
 public:
  // finish may be null. tally: int32 [3] on the current device, (rows active, failed, iterations
  // made), which the body updates. Throws std::runtime_error where the body holds a node that a
  // conditional may not, or the driver refuses.
  WhileGraph(cudaGraph_t prepare, cudaGraph_t body, cudaGraph_t finish, const int32_t* tally,
             int max_iterations);
  ~WhileGraph();
  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;

  void launch(cudaStream_t stream) const;

 private:
  void build(cudaGraph_t prepare, cudaGraph_t body, cudaGraph_t finish, const int32_t* tally,
             int max_iterations);
  void destroy();

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// Version of the installed driver, 1000 major + 10 minor; WHILE nodes need 12040. 0: none.
int driver_version();

}  // namespace fpi::cuda
