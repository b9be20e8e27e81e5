#include "while_graph.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

static_assert(CUDART_VERSION >= 12040, "fpi_cuda's CUDA library needs CUDA toolkit 12.4 or newer");

namespace fpi::cuda {
namespace {

// A kernel of our own at the end of the body, so that the step operators know nothing of graphs
// and what torch captured is used as it is: the handle exists only with the graph it belongs to.
__global__ void set_condition(cudaGraphConditionalHandle handle, const int32_t* tally,
                              int32_t max_iterations) {
  cudaGraphSetConditional(handle, tally[0] > 0 && tally[2] < max_iterations);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // reported here; nothing later is to find it
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                     cudaGraphNodeParams* params) {
  const size_t count = after == nullptr ? 0 : 1;
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, after, nullptr, count, params);
#else
  return cudaGraphAddNode(node, graph, after, count, params);
#endif
}

const char* forbidden(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
    case cudaGraphNodeTypeMemcpy:
    case cudaGraphNodeTypeMemset:
    case cudaGraphNodeTypeEmpty:
    case cudaGraphNodeTypeGraph:
      return nullptr;
    case cudaGraphNodeTypeHost:
      return "a host function";
    case cudaGraphNodeTypeWaitEvent:
    case cudaGraphNodeTypeEventRecord:
      return "an event of another capture";
    case cudaGraphNodeTypeMemAlloc:
    case cudaGraphNodeTypeMemFree:
      return "a memory allocation";
    case cudaGraphNodeTypeConditional:
      return "a conditional node, which no child graph may hold";
    default:
      return "a node that a loop on the device may not hold";
  }
}

// For what has nobody to tell of an error: nothing later is to find it.
void forget(cudaError_t error) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
  }
}

// While it lives, this thread may do what a capture forbids in its own or any thread: allocate and
// free, as building and destroying a graph does. A WhileGraph may die in the middle of a capture,
// when Python's collector finds it, and be built while another thread captures. Nothing of that
// belongs to the capture, which goes on.
class OutsideCaptures {
 public:
  OutsideCaptures() { exchange(); }
  ~OutsideCaptures() { exchange(); }
  OutsideCaptures(const OutsideCaptures&) = delete;
  OutsideCaptures& operator=(const OutsideCaptures&) = delete;

 private:
  // Leaves in mode_ what held before, for the next call.
  void exchange() { forget(cudaThreadExchangeStreamCaptureMode(&mode_)); }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// That all nodes lie on one device is for the driver to check, at instantiation.
void check_nodes(cudaGraph_t graph) {
  size_t count = 0;
  check(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(count);
  check(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    if (const char* what = forbidden(type)) {
      throw std::runtime_error(std::string("an iteration contains ") + what);
    }
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      check(cudaGraphChildGraphNodeGetGraph(node, &child), "cudaGraphChildGraphNodeGetGraph");
      check_nodes(child);
    }
  }
}

}  // namespace

WhileGraph::WhileGraph(cudaGraph_t prepare, cudaGraph_t body, cudaGraph_t finish,
                       const int32_t* tally, int max_iterations) {
  const OutsideCaptures outside;
  try {
    build(prepare, body, finish, tally, max_iterations);
  } catch (...) {
    destroy();
    throw;
  }
}

void WhileGraph::build(cudaGraph_t prepare, cudaGraph_t body, cudaGraph_t finish,
                       const int32_t* tally, int max_iterations) {
  check_nodes(body);
  check(cudaGraphCreate(&graph_, 0), "cudaGraphCreate");
  cudaGraphNode_t before = nullptr;
  check(cudaGraphAddChildGraphNode(&before, graph_, nullptr, 0, prepare), "adding the preparation");

  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, graph_, 1, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  cudaGraphNodeParams loop_params = {};
  loop_params.type = cudaGraphNodeTypeConditional;
  loop_params.conditional.handle = handle;
  loop_params.conditional.type = cudaGraphCondTypeWhile;
  loop_params.conditional.size = 1;
  cudaGraphNode_t loop = nullptr;
  check(add_node(&loop, graph_, &before, &loop_params), "adding the WHILE node");

  cudaGraph_t inside = loop_params.conditional.phGraph_out[0];
  cudaGraphNode_t iteration = nullptr;
  check(cudaGraphAddChildGraphNode(&iteration, inside, nullptr, 0, body), "adding the iteration");
  void* arguments[] = {&handle, &tally, &max_iterations};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(&set_condition);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  cudaGraphNode_t condition = nullptr;
  check(cudaGraphAddKernelNode(&condition, inside, &iteration, 1, &kernel), "adding the condition");

  if (finish != nullptr) {
    cudaGraphNode_t after = nullptr;
    check(cudaGraphAddChildGraphNode(&after, graph_, &loop, 1, finish), "adding the end");
  }
  check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
}

WhileGraph::~WhileGraph() { destroy(); }

void WhileGraph::destroy() {
  const OutsideCaptures outside;
  if (executable_ != nullptr) {
    forget(cudaGraphExecDestroy(executable_));
    executable_ = nullptr;
  }
  if (graph_ != nullptr) {
    forget(cudaGraphDestroy(graph_));
    graph_ = nullptr;
  }
}

void WhileGraph::launch(cudaStream_t stream) const {
  check(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch");
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fpi::cuda
