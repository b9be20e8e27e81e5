// The machine of csrc/cuda/primitives.cuh on the host: the threads of a block are fibers that one
// scheduler runs, and every primitive is a point where it may go on with another.
//
// Found out: threads that part at a barrier or a shuffle; reads past a buffer, and of what nobody
// wrote (AddressSanitizer and poison in one build); accesses that no barrier, or fence with atomic,
// puts in order (races.h, in the other build).
#pragma once

#include <cstddef>
#include <cstdint>
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
// Gives `value` to the warp and takes that of the lane `source`.
void exchange(const void* value, void* result, size_t bytes, int source);

void run(void (*body)(const void*), const void* argument, int threads, int64_t blocks,
         size_t shared_bytes);

}  // namespace fpi::emulation

#include "races.h"

namespace fpi::cuda {

constexpr int kWarp = 32;

using emulation::atomic_add;
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
