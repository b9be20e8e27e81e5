// Bodies that show what the emulation finds; each is right, but for the fault that a test asks for.
#include "../../csrc/cuda/primitives.cuh"
#include "serve.h"

namespace fpi::cuda {
namespace {

// total[0] = Σ values: every block's sum by a tree in shared memory; the block that comes last adds
// up the partial sums and zeroes the arrivals.
struct Sum {
  static constexpr int kThreads = 64;
  const float* values;
  int64_t count;
  float* partials;
  int32_t* arrivals;
  float* total;

  FPI_DEVICE float block_sum(float mine) const {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index();
    shared[i] = mine;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      block_barrier();
      if (i < half) {
        shared[i] += shared[i + half];
      }
    }
    block_barrier();
    return shared[0];
  }

  void operator()() const {
    int32_t* last = reinterpret_cast<int32_t*>(shared_memory() + kThreads * sizeof(float));
    float mine = 0;
    for (int64_t i = block_index() * kThreads + thread_index(); i < count;
         i += grid_size() * kThreads) {
      mine += values[i];
    }
    mine = block_sum(mine);
    if (thread_index() == 0) {
      partials[block_index()] = mine;
      device_fence();
      *last = atomic_add(arrivals, 1) == grid_size() - 1;
    }
    block_barrier();
    if (*last) {
      mine = 0;
      for (int64_t i = thread_index(); i < grid_size(); i += kThreads) {
        mine += load_uncached(partials + i);
      }
      mine = block_sum(mine);
      if (thread_index() == 0) {
        *total = mine;
        *arrivals = 0;
      }
    }
  }
};

// reversed[i] = values[31 − i] twice over, by shared memory that a warp exchanges and by shuffles.
struct Reversed {
  static constexpr int kThreads = 64;
  const float* values;
  float* reversed;

  void operator()() const {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index(), mirrored = i ^ (kWarp - 1);
    shared[i] = values[i];
    warp_barrier();
    const float once = shared[mirrored];
    const float again = shuffle(once, mirrored % kWarp);
    reversed[i] = shuffle_xor(again, kWarp - 1);
  }
};

enum Fault {
  kSkipsBarrier,
  kTwoBarriers,
  kSkipsShuffle,
  kOverrun,
  kUnwritten,
  kStaleRead,
  kSkipsMatrices,
  kPartsBeforeMatrices,
  kJoinsBeforeMatrices,  // this one is right
};

struct Faulty {
  static constexpr int kThreads = 64;
  Fault fault;
  int32_t* shared_by_blocks;

  void operator()() const {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index();
    if (fault == kSkipsBarrier && i != 7) {
      block_barrier();
    } else if (fault == kTwoBarriers) {
      if (i < 32) {
        block_barrier();
      } else {
        block_barrier();
      }
    } else if (fault == kSkipsShuffle && i != 7) {
      shuffle(1.0f, 0);
    } else if (fault == kOverrun) {
      shared[i + 1] = 0;
    } else if (fault == kUnwritten) {
      shared[i] = shared[i] + 1;
    } else if (fault == kStaleRead) {
      if (i == 0) {
        shared_by_blocks[1 + block_index()] = 1;
        device_fence();
        if (atomic_add(shared_by_blocks, 1) == 1) {
          shared_by_blocks[3] = shared_by_blocks[2 - block_index()];
        }
      }
    } else if (fault >= kSkipsMatrices) {
      multiply(i);
    }
  }

  // A warp's product, of which some lanes write something before, or to which one does not come.
  FPI_DEVICE void multiply(int i) const {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[i] = 1;
    block_barrier();
    MatrixProduct<float, 1, 2> product;
    product.place_a(shared, 8, 1);
    product.place_b(shared + 16, 8, 1);
    float acc[1][2][4] = {};
    if (fault != kSkipsMatrices && i % 3 == 0) {
      shared[32 + i % 32] = 2;
    }
    if (fault == kJoinsBeforeMatrices) {
      warp_barrier();
    }
    if (fault != kSkipsMatrices || i != 7) {
      product.add(acc, 0, 0);
      product.add(acc, 0, 0);
    }
    block_barrier();
    shared[i] = acc[0][0][0];
  }
};

using emulation::Operator;
using emulation::Request;

const Operator sum("sum", [](const Request& r) {
  launch(Sum{r.array<float>("values"), r.integer("count"), r.array<float>("partials"),
             r.array<int32_t>("arrivals"), r.array<float>("total")},
         r.integer("blocks"), (Sum::kThreads + 1) * sizeof(float));
});

const Operator reversed("reversed", [](const Request& r) {
  launch(Reversed{r.array<float>("values"), r.array<float>("reversed")}, 1,
         Reversed::kThreads * sizeof(float));
});

const Operator faulty("faulty", [](const Request& r) {
  launch(Faulty{static_cast<Fault>(r.integer("fault")), r.array<int32_t>("shared_by_blocks")}, 2,
         Faulty::kThreads * sizeof(float));
});

}  // namespace
}  // namespace fpi::cuda
