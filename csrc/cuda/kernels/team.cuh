// The threads that share a row: a warp or a block.
#pragma once

#include <type_traits>

#include "../plan.h"
#include "../primitives.cuh"

namespace fpi::cuda {

static_assert(kWarp == kWarpThreads);

struct Team {
  int size;
  int rank;    // of this thread
  int number;  // of this team in its block

  FPI_DEVICE static Team of(int size) {
    return {size, thread_index() % size, thread_index() / size};
  }

  FPI_DEVICE int lane() const { return rank % kWarp; }
  FPI_DEVICE int warp() const { return rank / kWarp; }
  FPI_DEVICE int warps() const { return size / kWarp; }

  // All of the team arrive; what they wrote before is seen by all of them after.
  FPI_DEVICE void barrier() const {
    if (size == kWarp) {
      warp_barrier();
    } else {
      block_barrier();
    }
  }

  // Joins the values of all threads by a tree of fixed shape: lanes by halves, then warps in their
  // order. joined [kCount] is in shared memory and seen by all after; stage [warps][kCount] too is
  // free again then. Or joined(i, value) puts it somewhere.
  template <int kCount, typename Acc, typename Joined, typename Join>
  FPI_DEVICE void reduce(const Acc (&values)[kCount], Acc* stage, const Joined& joined,
                         const Join& join) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Acc value = over_warp(values[i], join);
      if (lane() == 0) {
        stage[warp() * kCount + i] = value;
      }
    }
    barrier();
    for (int i = rank; i < kCount; i += size) {
      Acc value = stage[i];
      for (int w = 1; w < warps(); ++w) {
        value = join(value, stage[w * kCount + i]);
      }
      if constexpr (std::is_pointer_v<Joined>) {
        joined[i] = value;
      } else {
        joined(i, value);
      }
    }
    barrier();
  }

  template <typename Acc, typename Join>
  FPI_DEVICE static Acc over_warp(Acc value, const Join& join) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      value = join(value, shuffle_xor(value, mask));
    }
    return value;
  }
};

}  // namespace fpi::cuda
