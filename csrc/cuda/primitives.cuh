// All that a kernel body may ask of the machine. A body is a functor over plain pointers and
// numbers that calls these and csrc/math, and nothing else: nvcc compiles it for the device, and
// any C++ compiler for the host, where tests/emulation stands in for the block.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FPI_DEVICE __device__ __forceinline__

namespace fpi::cuda {

constexpr int kWarp = 32;

// One-dimensional blocks and grids.
FPI_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FPI_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
FPI_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
FPI_DEVICE int64_t grid_size() { return static_cast<int64_t>(gridDim.x); }

// Shared memory of the block, 16-byte aligned: the bytes that the launch asked for.
FPI_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Every thread of the block arrives; what they wrote before is seen by all after.
FPI_DEVICE void block_barrier() { __syncthreads(); }

// Every thread of the warp arrives; what they wrote before is seen by all of the warp after.
// A shuffle orders no memory.
FPI_DEVICE void warp_barrier() { __syncwarp(); }

// value of the lane whose number differs in the bits of mask. All 32 lanes of the warp take part.
template <typename T>
FPI_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// value of the given lane. All 32 lanes of the warp take part.
template <typename T>
FPI_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Global memory: what this thread wrote before is seen before what it writes after.
FPI_DEVICE void device_fence() { __threadfence(); }

// Returns the value before; integers only, so that no result depends on the order.
FPI_DEVICE int32_t atomic_add(int32_t* address, int32_t value) { return atomicAdd(address, value); }

// A read that goes past this multiprocessor's cache, for what another block wrote in this launch.
template <typename T>
FPI_DEVICE T load_uncached(const T* address) {
  return __ldcg(address);
}

// A functor's operator()() is one thread's work. kThreads are in a block, and at least kBlocks fit
// a multiprocessor, which bounds the registers of a thread by 65536 / (kThreads kBlocks).
template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kBlocks) run(const Body body) {
  body();
}

template <typename Body>
void launch(const Body& body, int64_t blocks, size_t shared_bytes, cudaStream_t stream) {
  run<<<static_cast<unsigned>(blocks), Body::kThreads, shared_bytes, stream>>>(body);
}

}  // namespace fpi::cuda

#else

#include "emulation.h"  // tests/emulation: the same names in the same namespace

#endif
