// x ← x + β (g(x) − x) over whole tensors, as one vector: reads x and g(x), writes x.
#pragma once

#include "pack.cuh"

namespace fpi::cuda {

template <typename T>
struct DampedUpdate {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  // Enough blocks to fill any device, few enough to be worth launching.
  static constexpr int64_t kMaxGrid = 4096;

  T* x;
  const T* gx;
  accumulate_t<T> beta;
  int64_t count;
  bool aligned;  // both begin at a multiple of 16 bytes

  static constexpr int64_t blocks(int64_t count) {
    const int64_t wanted = divide_up(count, kThreads * kWidth<T>);
    return wanted < kMaxGrid ? wanted : kMaxGrid;
  }

  FPI_DEVICE void operator()() const {
    // All threads of the grid are one team.
    const Team all = {static_cast<int>(grid_size()) * kThreads,
                      static_cast<int>(block_index()) * kThreads + thread_index(), 0};
    const auto damp = [&](int64_t i, auto access) {
      access.store(x + i, damped(access.load(x + i), access.load(gx + i), beta));
    };
    const int64_t whole = count / kWidth<T> * kWidth<T>;
    for_packs<T>(all, 0, whole, aligned, damp);
    for_packs<T>(all, whole, count, false, damp);
  }
};

}  // namespace fpi::cuda
