// The machine of csrc/cuda/primitives.cuh on the host: the threads of a block are fibers that one
// scheduler runs, and every primitive is a point where it may go on with another.
//
// Found out: threads that part at a barrier, a shuffle or a warp's instruction; reads past a
// buffer, and of what nobody wrote (AddressSanitizer and poison in one build); accesses that no
// barrier, or fence with atomic, puts in order, and lanes that come to a warp's instruction by
// different ways (races.h, in the other build).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

// A primitive is known by the address that called it. All inlined into the body, that address tells
// the whole chain of calls: a barrier in a helper is as many barriers as it has callers.
#define FPI_DEVICE inline __attribute__((always_inline))

namespace fpi::emulation {

enum class Order {
  kForward,  // the first thread of the first block that can go on: it runs ahead of all others
  kReverse,  // the last thread of the last block
  kRandom,   // any thread of any block alive, drawn anew at every primitive
};

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;
  size_t alive = 4;                // blocks whose threads are interleaved
  std::vector<uintptr_t> deleted;  // calls of barriers and fences that do nothing
};

// Holds for the launches that follow; forgets the sites of those before.
void configure(const Options& options);

// The barriers and fences that threads have come to.
struct Reached {
  const char* kind;
  uintptr_t caller;
};
std::vector<Reached> reached();

// "file:line" of code in this executable, then its callers that were inlined.
std::string place(uintptr_t code);

// Tells what went wrong and ends the process.
[[noreturn]] void fail(const std::string& message);

int thread_index();
int block_size();
int64_t block_index();
int64_t grid_size();
unsigned char* shared_memory();
void block_barrier();
void warp_barrier();
void device_fence();
int32_t atomic_add(int32_t* address, int32_t value);
int32_t atomic_max(int32_t* address, int32_t value);
// Delivered when the thread waits; until then the copy's place holds NaN in every format.
void async_copy_16(void* shared, const void* global);
void async_commit();
void async_wait(int left);
// Gives `value` to the warp and takes that of the lane `source`.
void exchange(const void* value, void* result, size_t bytes, int source);

// An instruction of the warp as a whole, while it lives: every lane comes to it, and since their
// last barrier or such instruction all have come the same way.
struct Together {
  Together();
  ~Together();
};

// The next launch may have so many bytes of shared memory.
void allow_shared(size_t bytes);

void run(void (*body)(const void*), const void* argument, int threads, int64_t blocks,
         size_t shared_bytes);

}  // namespace fpi::emulation

#include "races.h"

namespace fpi::cuda {

constexpr int kWarp = 32;

using emulation::async_commit;
using emulation::async_copy_16;
using emulation::atomic_add;
using emulation::atomic_max;
using emulation::block_barrier;
using emulation::block_index;
using emulation::block_size;
using emulation::device_fence;
using emulation::grid_size;
using emulation::shared_memory;
using emulation::thread_index;
using emulation::warp_barrier;

template <typename T>
FPI_DEVICE T shuffle(T value, int lane) {
  static_assert(std::is_trivially_copyable_v<T>);
  T result;
  emulation::exchange(&value, &result, sizeof(T), lane);
  return result;
}

template <typename T>
FPI_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, (thread_index() % kWarp) ^ mask);
}

template <typename Value>
FPI_DEVICE void store_16(void* address, const Value& value) {
  static_assert(sizeof(Value) == 16);
  *static_cast<Value*>(address) = value;
}

template <int kLeft>
FPI_DEVICE void async_wait() {
  emulation::async_wait(kLeft);
}

// To the 11 significand bits of tf32, ties away from zero.
FPI_DEVICE float rounded_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Every lane reads what its own values need. Those of no row stay what they were.
template <typename T, int kHigh, int kWide>
struct MatrixProduct {
  const T *a, *b;
  int a_stride, b_stride, a_last, b_last;

  void place_a(const T* rows, int stride, int last) { a = rows, a_stride = stride, a_last = last; }
  void place_b(const T* rows, int stride, int last) { b = rows, b_stride = stride, b_last = last; }

  void add(float (&acc)[kHigh][kWide][4], int k_a, int k_b) const {
    const emulation::Together instruction;
    constexpr int kChunk = 32 / static_cast<int>(sizeof(T));
    const int lane = thread_index() % kWarp;
    for (int e = 0; e < kHigh * kWide * 4; ++e) {
      const int i = e / 4 / kWide, j = e / 4 % kWide;
      const int row = i * 16 + lane / 4 + (e % 4 / 2) * 8, column = j * 8 + lane % 4 * 2 + e % 2;
      if (row > a_last || column > b_last) {
        continue;
      }
      const T *x = a + row * a_stride + k_a, *y = b + column * b_stride + k_b;
      for (int k = 0; k < kChunk; ++k) {
        acc[i][j][e % 4] += operand(x[k]) * operand(y[k]);
      }
    }
  }

 private:
  static float operand(T value) {
    const float wide = static_cast<float>(value);
    return std::is_same_v<T, float> ? rounded_to_tf32(wide) : wide;
  }
};

template <typename T>
FPI_DEVICE T load_uncached(const T* address) {
  const emulation::Uncached reading;
  return *address;
}

// The stream is the device's alone.
template <typename Body>
void launch(const Body& body, int64_t blocks, size_t shared_bytes, const void* = nullptr) {
  static_assert(Body::kThreads % kWarp == 0);
  emulation::run([](const void* argument) { (*static_cast<const Body*>(argument))(); }, &body,
                 Body::kThreads, blocks, shared_bytes);
}

}  // namespace fpi::cuda
