// All that a kernel body may ask of the machine. A body is a functor over plain pointers and
// numbers that calls these and csrc/math, and nothing else: nvcc compiles it for the device, and
// any C++ compiler for a machine whose header FPI_MACHINE names.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>

#include <type_traits>

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

// The 16 bytes of `value` to an address that is a multiple of 16, in one access. nvcc splits the
// assignment of a struct into its members.
template <typename Value>
FPI_DEVICE void store_16(void* address, const Value& value) {
  static_assert(sizeof(Value) == 16);
  uint32_t words[4];
  memcpy(words, &value, sizeof words);
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Global memory: what this thread wrote before is seen before what it writes after.
FPI_DEVICE void device_fence() { __threadfence(); }

// Returns the value before; integers only, so that no result depends on the order.
FPI_DEVICE int32_t atomic_add(int32_t* address, int32_t value) { return atomicAdd(address, value); }

FPI_DEVICE int32_t atomic_max(int32_t* address, int32_t value) { return atomicMax(address, value); }

// A read that goes past this multiprocessor's cache, for what another block wrote in this launch.
template <typename T>
FPI_DEVICE T load_uncached(const T* address) {
  return __ldcg(address);
}

// 16 bytes from global to shared memory, both at multiples of 16, on their way while the thread
// goes on. They are there once the thread has waited; other threads see them behind a barrier after
// that.
FPI_DEVICE void async_copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}

// This thread's copies since the last call are a group.
FPI_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups, all but the last kLeft.
template <int kLeft>
FPI_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 × 16-byte matrices of shared memory: the lanes give the 32 rows' addresses, and get four
// bytes of a row of each.
FPI_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// acc [16 × 8] += a [16 × 32 bytes] b [8 × 32 bytes]ᵀ. float means tf32.
template <typename T>
FPI_DEVICE void multiply_matrices(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
#define FPI_MMA(SHAPE)                                                                             \
  asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, float>) {
    FPI_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    FPI_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    FPI_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
#undef FPI_MMA
}

FPI_DEVICE uint32_t rounded_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// A warp's product on tensor cores: acc [16 kHigh × 8 kWide] += A Bᵀ, for rows of A and B in shared
// memory that begin at multiples of 16 bytes. Rows beyond the last of A or B are its last again.
// float means tf32. A lane has, of each 16 × 8, the rows lane / 4 and 8 more, and the columns
// 2 (lane % 4) and one more.
template <typename T, int kHigh, int kWide>
struct MatrixProduct {
  static_assert(kWide % 2 == 0);
  uint32_t a[kHigh], b[kWide / 2];  // addresses of this lane's rows

  // Strides are in values.
  FPI_DEVICE void place_a(const T* rows, int stride, int last) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
      const int row = i * 16 + lane % 16;
      a[i] = address(rows + (row < last ? row : last) * stride) + lane / 16 * 16;
    }
  }
  FPI_DEVICE void place_b(const T* rows, int stride, int last) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int j = 0; j < kWide / 2; ++j) {
      const int row = (2 * j + lane / 16) * 8 + lane % 8;
      b[j] = address(rows + (row < last ? row : last) * stride) + lane / 8 % 2 * 16;
    }
  }

  // The 32 bytes of k from the values k_a of A's rows and k_b of B's on. These are instructions of
  // the warp (`.aligned`): all lanes must come to them together, so where they may have parted
  // since their last barrier, by a condition or a loop that is not the warp's as a whole, a
  // warp_barrier must stand before. A shuffle only waits for all lanes, wherever they come from.
  FPI_DEVICE void add(float (&acc)[kHigh][kWide][4], int k_a, int k_b) const {
    uint32_t as[kHigh][4];
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
      load(as[i], a[i] + k_a * static_cast<int>(sizeof(T)));
    }
#pragma unroll
    for (int j = 0; j < kWide / 2; ++j) {
      uint32_t bs[4];
      load(bs, b[j] + k_b * static_cast<int>(sizeof(T)));
#pragma unroll
      for (int i = 0; i < kHigh; ++i) {
        multiply_matrices<T>(acc[i][2 * j], as[i], bs[0], bs[1]);
        multiply_matrices<T>(acc[i][2 * j + 1], as[i], bs[2], bs[3]);
      }
    }
  }

 private:
  FPI_DEVICE static uint32_t address(const T* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
  FPI_DEVICE static void load(uint32_t (&words)[4], uint32_t row) {
    load_matrices(words, row);
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (uint32_t& word : words) {
        word = rounded_to_tf32(word);
      }
    }
  }
};

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

// Shared memory beyond 48 KiB needs leave, once a kernel and device: for all that a block of the
// current device may have, never for what one launch needs. Threads that launch the same kernel for
// other shapes then ask for the same, and none takes away what another is about to use.
template <typename Body>
cudaError_t allow_shared(int64_t device_limit) {
  return cudaFuncSetAttribute(run<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(device_limit));
}

}  // namespace fpi::cuda

#else

#include FPI_MACHINE  // the same names in the same namespace

#endif
