// Marks a formula that the CPU and the CUDA kernels share.
#pragma once

// Always inlined on the host, where this header is compiled once for each instruction set: see
// csrc/cpu/capability.h.
#if defined(__CUDACC__)
#define FPI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FPI_HOST_DEVICE inline __attribute__((always_inline))
#endif
