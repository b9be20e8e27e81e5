// A whole solve of a step of dense layers: see csrc/math/dense.h.
//
// A block keeps a tile of slots, a sample each, and takes all of its samples one iteration further
// at a time: the operand t = s ∘ x, the product or the two, the step of the solver. A slot whose
// sample has ended takes the next one that waits. Products are of the rows that hold a sample: a
// tile shrinks when none wait any more. No block waits for another, and every sample ends.
//
// While it is in a slot, a sample's record lies there too, and the step knows the sample by its
// slot.
#pragma once

#include "../../math/dense.h"
#include "../../math/window.h"
#include "product.cuh"
#include "rows.cuh"

namespace fpi::cuda {

// Of a solve, in device memory: samples that were taken, blocks that are done, the most iterations
// of a sample.
struct DenseCounts {
  int32_t taken, done, most;
};
static_assert(sizeof(DenseCounts) <= kPackBytes);

// Of a block, in its shared memory.
struct DenseShared {
  int32_t active;   // slots that hold a sample
  int32_t waiting;  // whether samples may be left to take
  int32_t failed;   // samples that ended otherwise than converged
  int32_t most;     // iterations of a sample
};
static_assert(sizeof(DenseShared) <= kDenseSharedBytes);

template <typename Acc>
FPI_DEVICE Acc activated(Activation activation, Acc value) {
  switch (activation) {
    case kTanh:
      return activate<kTanh>(value);
    case kRelu:
      return activate<kRelu>(value);
    case kSigmoid:
      return activate<kSigmoid>(value);
    case kSoftplus:
      return activate<kSoftplus>(value);
    case kGelu:
      return activate<kGelu>(value);
    default:
      return value;
  }
}

template <typename T, bool kMatrix, typename Solver>
struct DenseSolve {
  static constexpr int kThreads = kDenseThreads;
  // Two leave 128 registers, too few for Anderson's step or for the widest exact tile.
  static constexpr int kBlocks = kMatrix && !Solver::kHasWindow ? 2 : 1;
  using Acc = accumulate_t<T>;

  Solver solver;  // a step operator's body; its rows are slots, and its n is padded
  DenseStep<T> dense;
  DensePlan plan;
  int64_t samples;
  const T* x0;
  T* out;
  Record<Acc> record;  // of all samples
  int32_t* tally;
  DenseCounts* counts;
  T *x, *gx;  // of all blocks' slots, unless they are shared

  // A block's solver, and its slots' iterates.
  struct Tile {
    Solver solver;
    T *x, *gx;
    int padded;  // values of a row

    FPI_DEVICE T* x_of(int slot) const { return x + slot * padded; }
    FPI_DEVICE T* gx_of(int slot) const { return gx + slot * padded; }
  };

  template <typename Item>
  FPI_DEVICE static Item* at(int64_t offset) {
    return reinterpret_cast<Item*>(shared_memory() + offset);
  }
  FPI_DEVICE int32_t* active_slots() const { return at<int32_t>(plan.active); }
  FPI_DEVICE int32_t* samples_of_slots() const { return at<int32_t>(plan.samples); }
  FPI_DEVICE int32_t* fresh_slots() const { return at<int32_t>(plan.fresh); }

  FPI_DEVICE DenseShared* block_shared() const { return at<DenseShared>(plan.block_shared); }

  // Made anew where it is used, and with constants where the host gave the same: registers are
  // scarce.
  FPI_DEVICE Tile tile() const {
    const int64_t slots = block_index() * plan.slots;
    const int padded = static_cast<int>(plan.rows.span);
    Tile tile = {solver, plan.is_shared ? at<T>(plan.x) : x + slots * padded,
                 plan.is_shared ? at<T>(plan.gx) : gx + slots * padded, padded};
    tile.solver.batch.aligned = true;
    tile.solver.batch.plan.parts = 1;
    if constexpr (Solver::kHasWindow) {
      tile.solver.window.by_row = true;
    } else {
      tile.solver.trail.by_row = true;
    }
    Record<Acc>& mine = tile.solver.batch.record;
    mine.index = nullptr;
    mine.counters = at<int32_t>(plan.counters);
    mine.scalars = at<Acc>(plan.scalars);
    mine.bounds = record.bounds == nullptr ? nullptr : at<Acc>(plan.bounds);
    return tile;
  }

  FPI_DEVICE void operator()() const {
    begin();
    for (;;) {
      if (thread_index() < kWarp) {
        refill();
      }
      block_barrier();
      const int active = block_shared()->active;
      if (active == 0) {
        break;
      }
      read(active);
      block_barrier();
#pragma unroll 1
      for (int layer = dense.has_hidden ? 0 : 1; layer < 2; ++layer) {
        multiply(active, layer == 0);
        block_barrier();
      }
      advance(active);
      block_barrier();
    }
    if (thread_index() == 0) {
      finish();
    }
  }

  // Empty slots, the zeros that nobody writes again, and the weights that stay.
  FPI_DEVICE void begin() const {
    const Tile tile = this->tile();
    if (thread_index() == 0) {
      *block_shared() = {0, 1, 0, 0};
    }
    for (int slot = thread_index(); slot < plan.slots; slot += kThreads) {
      samples_of_slots()[slot] = -1;
    }
    for (int i = thread_index(); i < plan.slots * tile.padded; i += kThreads) {
      if (i % tile.padded >= dense.n) {
        tile.gx[i] = T(0.0f);
      }
    }
    if (dense.has_hidden) {
      const int stride = stride_of_k(dense.output.in);
      for (int i = thread_index(); i < plan.slots * stride; i += kThreads) {
        if (i % stride >= dense.output.in) {
          at<T>(plan.hidden)[i] = T(0.0f);
        }
      }
      share_rows(dense.hidden, plan.shared_hidden, at<T>(plan.weight_hidden));
    }
    share_rows(dense.output, plan.shared_output, at<T>(plan.weight_output));
    async_wait<0>();
    block_barrier();
  }

  FPI_DEVICE static int stride_of_k(int64_t k) {
    return static_cast<int>(stride_of(k, static_cast<int>(sizeof(T))));
  }

  // Empties the slots of samples that ended, gives them to the next ones, and lists those in use.
  // By one warp.
  FPI_DEVICE void refill() const {
    const int lane = thread_index() % kWarp;
    const int32_t* counters = at<int32_t>(plan.counters);
    bool waiting = block_shared()->waiting != 0;
    int active = 0;
    do {
      active = 0;
      for (int first = 0; first < plan.slots; first += kWarp) {
        const int slot = first + lane;
        const bool is_slot = slot < plan.slots;
        int sample = is_slot ? samples_of_slots()[slot] : -1;
        if (sample >= 0 && counters[slot * kCounters + kStatus] != kActive) {
          sample = -1;
        }
        const int next = waiting ? take(is_slot && sample < 0, waiting) : -1;
        sample = next < 0 ? sample : next;
        const int is_active = sample >= 0, before = count_before(is_active);
        if (is_slot) {
          samples_of_slots()[slot] = sample;
          fresh_slots()[slot] = next >= 0;
        }
        if (is_active) {
          active_slots()[active + before] = slot;
        }
        active += shuffle(before + is_active, kWarp - 1);
      }
    } while (active == 0 && waiting);  // all those taken had their results already
    warp_barrier();
    if (lane == 0) {
      block_shared()->active = active;
      block_shared()->waiting = waiting;
    }
  }

  // The next sample that waits, for each lane that wants one, or −1. A sample that has its result
  // already is left alone, and its slot empty for now.
  FPI_DEVICE int take(int wants, bool& waiting) const {
    const int before = count_before(wants), all = shuffle(before + wants, kWarp - 1);
    if (all == 0) {
      return -1;
    }
    int32_t taken = 0;
    if (thread_index() % kWarp == 0) {
      taken = atomic_add(&counts->taken, all);
    }
    taken = shuffle(taken, 0);
    waiting = taken + all < samples;
    const int64_t sample = taken + before;
    const bool is_new =
        wants != 0 && sample < samples && record.counters[sample * kCounters + kStatus] == kActive;
    return is_new ? static_cast<int>(sample) : -1;
  }

  // The sum over the lanes below.
  FPI_DEVICE static int count_before(int value) {
    const int lane = thread_index() % kWarp;
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = shuffle(sum, lane < distance ? lane : lane - distance);
      sum += lane < distance ? 0 : other;
    }
    return sum - value;
  }

  // The operand's rows; and a new sample's iterate and record, which its slot holds from now on.
  FPI_DEVICE void read(int active) const {
    const Tile tile = this->tile();
    constexpr int kPack = kWidth<T>;
    const Access<T, kPack> access;
    const int lane = thread_index() % kWarp, n = static_cast<int>(dense.n);
    const Record<Acc>& mine = tile.solver.batch.record;
    for (int i = thread_index() / kWarp; i < active; i += kDenseWarps) {
      const int slot = active_slots()[i];
      const int64_t sample = samples_of_slots()[slot];
      const bool is_fresh = fresh_slots()[slot] != 0;
      T* state = tile.x_of(slot);
      T* operand = at<T>(plan.operand) + i * stride_of_k(dense.n);
      const T* scale = dense.scale.of(sample);
      for (int k = lane * kPack; k < tile.padded; k += kWarp * kPack) {
        Pack<T, kPack> pack;
        if (is_fresh) {
#pragma unroll
          for (int l = 0; l < kPack; ++l) {
            pack.values[l] = k + l < n ? x0[sample * n + k + l] : T(0.0f);
          }
          access.store(state + k, pack);
        } else {
          pack = access.load(state + k);
        }
        if (scale != nullptr) {
#pragma unroll
          for (int l = 0; l < kPack; ++l) {
            if (k + l < n) {
              pack.values[l] =
                  static_cast<T>(static_cast<Acc>(scale[k + l]) * static_cast<Acc>(pack.values[l]));
            }
          }
        }
        access.store(operand + k, pack);
      }
      if (is_fresh) {
        if (lane < kCounters) {
          mine.counters[slot * kCounters + lane] = record.counters[sample * kCounters + lane];
        }
        if (lane < kScalars) {
          mine.scalars[slot * kScalars + lane] = record.scalars[sample * kScalars + lane];
        }
        if (lane < record.bound_columns && record.bounds != nullptr) {
          at<Acc>(plan.bounds)[slot * record.bound_columns + lane] =
              record.bounds[sample * record.bound_columns + lane];
        }
      }
    }
  }

  // One layer of g: to the hidden tile, or to g(x).
  FPI_DEVICE void multiply(int active, bool is_hidden) const {
    const Tile tile = this->tile();
    const DenseLayer<T>& layer = is_hidden ? dense.hidden : dense.output;
    const T* operand = is_hidden || !dense.has_hidden ? at<T>(plan.operand) : at<T>(plan.hidden);
    const Weight<T> weight = {
        .source = layer.weight,
        .shared = at<T>(is_hidden ? plan.weight_hidden : plan.weight_output),
        .padded = static_cast<int>(layer.out_stride),
        .stride = stride_of_k(layer.in),
        .rows = static_cast<int>(layer.out),
        .shared_rows = static_cast<int>(is_hidden ? plan.shared_hidden : plan.shared_output)};
    const Acc residual = is_hidden ? Acc(0) : static_cast<Acc>(dense.residual);
    const int stride = stride_of_k(dense.n), hidden_stride = stride_of_k(dense.output.in);
    const auto take = [&](int i, int j, Acc value) {
      const int slot = active_slots()[i];
      const int64_t sample = samples_of_slots()[slot];
      const T* u = layer.u.of(sample);
      const T* scale = layer.scale.of(sample);
      if (u != nullptr && scale == nullptr) {
        value += static_cast<Acc>(u[j]);
      }
      if (residual != Acc(0)) {
        value += residual * static_cast<Acc>(at<T>(plan.operand)[i * stride + j]);
      }
      if (scale == nullptr) {
        value = activated(layer.activation, value);
      } else {
        value *= static_cast<Acc>(scale[j]);
        value += u == nullptr ? Acc(0) : static_cast<Acc>(u[j]);
      }
      T* to = is_hidden ? at<T>(plan.hidden) + i * hidden_stride : tile.gx_of(slot);
      to[j] = static_cast<T>(value);
    };
    product<kMatrix>(Rows<T>{operand, stride_of_k(layer.in), active}, weight, at<T>(plan.panels),
                     take);
  }

  // The solver's step of every sample, and the end of those that finish.
  FPI_DEVICE void advance(int active) const {
    const Tile tile = this->tile();
    const Team team = tile.solver.batch.team();
    for (int i = team.number; i < active; i += plan.rows.rows_per_block) {
      const int slot = active_slots()[i];
      T* state = tile.x_of(slot);
      const int64_t number = block_index() * plan.slots + slot;  // of its window or trail
      const Row<T> row = {.x = state,
                          .gx = tile.gx_of(slot),
                          .out = state,
                          .number = number,
                          .sample = slot,
                          .part = 0,
                          .begin = 0,
                          .end = tile.padded};
      if (tile.solver.advance(team, row).active == 0) {
        team.barrier();
        end(team, active_slots()[i]);
      }
    }
  }

  // The result and the record of a slot's sample, to where the caller wants them.
  FPI_DEVICE void end(const Team& team, int slot) const {
    const T* state = tile().x_of(slot);
    const int32_t* counters = at<int32_t>(plan.counters) + slot * kCounters;
    const int64_t sample = samples_of_slots()[slot];
    for (int64_t k = team.rank; k < dense.n; k += team.size) {
      out[sample * dense.n + k] = state[k];
    }
    if (team.rank < kCounters) {
      record.counters[sample * kCounters + team.rank] = counters[team.rank];
    }
    if (team.rank < kScalars) {
      record.scalars[sample * kScalars + team.rank] =
          at<Acc>(plan.scalars)[slot * kScalars + team.rank];
    }
    if (team.rank == 0) {
      atomic_add(&block_shared()->failed, counters[kStatus] != kConverged);
      atomic_max(&block_shared()->most, counters[kIterations]);
    }
  }

  // Brings the tally up to date: each block its failures, the last one the rest. By one thread.
  FPI_DEVICE void finish() const {
    atomic_add(tally + kFailed, block_shared()->failed);
    atomic_max(&counts->most, block_shared()->most);
    device_fence();
    if (atomic_add(&counts->done, 1) == grid_size() - 1) {
      device_fence();
      tally[kActiveRows] = 0;
      tally[kIteration] += load_uncached(&counts->most);
    }
  }
};

}  // namespace fpi::cuda
