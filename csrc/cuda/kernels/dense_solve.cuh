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
struct DenseNotes {
  int32_t active;  // slots that hold a sample
};
static_assert(sizeof(DenseNotes) <= kDenseNoteBytes);

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
  static constexpr int kBlocks = Solver::kBlocks >= 4 && sizeof(T) < 8 ? 2 : 1;
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

  // What a block works with.
  struct Tile {
    Solver solver;
    int32_t *active, *samples, *fresh;
    T *x, *gx, *operand, *hidden;
    int padded;
  };

  template <typename Item>
  FPI_DEVICE static Item* at(int64_t offset) {
    return reinterpret_cast<Item*>(shared_memory() + offset);
  }

  FPI_DEVICE void operator()() const {
    const int64_t slots = block_index() * plan.slots;
    const int padded = static_cast<int>(plan.rows.span);
    Tile tile = {solver,
                 at<int32_t>(plan.active),
                 at<int32_t>(plan.samples),
                 at<int32_t>(plan.fresh),
                 plan.is_shared ? at<T>(plan.x) : x + slots * padded,
                 plan.is_shared ? at<T>(plan.gx) : gx + slots * padded,
                 at<T>(plan.operand),
                 at<T>(plan.hidden),
                 padded};
    Record<Acc>& mine = tile.solver.step.record;
    mine.counters = at<int32_t>(plan.counters);
    mine.scalars = at<Acc>(plan.scalars);
    mine.floor = record.floor == nullptr ? nullptr : at<Acc>(plan.floor);

    begin(tile);
    Ended ended = {};
    for (bool waiting = true;;) {
      if (thread_index() < kWarp) {
        refill(tile, ended, waiting);
      }
      block_barrier();
      const int active = at<DenseNotes>(plan.notes)->active;
      if (active == 0) {
        break;
      }
      read(tile, active);
      block_barrier();
#pragma unroll 1
      for (int layer = dense.has_hidden ? 0 : 1; layer < 2; ++layer) {
        multiply(tile, active, layer == 0);
        block_barrier();
      }
      advance(tile, active);
      block_barrier();
    }
    if (thread_index() < kWarp) {
      finish(ended);
    }
  }

  // Empty slots, the zeros that nobody writes again, and the weights that stay.
  FPI_DEVICE void begin(const Tile& tile) const {
    for (int slot = thread_index(); slot < plan.slots; slot += kThreads) {
      tile.samples[slot] = -1;
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
          tile.hidden[i] = T(0.0f);
        }
      }
      keep_rows(dense.hidden, plan.kept_hidden, at<T>(plan.weight_hidden));
    }
    keep_rows(dense.output, plan.kept_output, at<T>(plan.weight_output));
    block_barrier();
  }

  FPI_DEVICE static int stride_of_k(int64_t k) {
    return static_cast<int>(stride_of(k, static_cast<int>(sizeof(T))));
  }

  // What a lane of the first warp knows of samples that ended.
  struct Ended {
    int32_t failed, most;
  };

  // Ends samples, gives their slots to the next ones, and lists the slots in use. By one warp.
  FPI_DEVICE void refill(const Tile& tile, Ended& ended, bool& waiting) const {
    const int lane = thread_index() % kWarp;
    int active = 0;
    for (int first = 0; first < plan.slots; first += kWarp) {
      const int slot = first + lane;
      int sample = -1;
      if (slot < plan.slots) {
        sample = tile.samples[slot];
        const int32_t* counters = tile.solver.step.record.counters + slot * kCounters;
        if (sample >= 0 && counters[kStatus] != kActive) {
          ended.failed += counters[kStatus] != kConverged;
          ended.most = ended.most > counters[kIterations] ? ended.most : counters[kIterations];
          sample = -1;
        }
      }
      int is_fresh = 0;
      if (waiting) {
        const int wants = slot < plan.slots && sample < 0;
        const int before = count_before(wants), all = shuffle(before + wants, kWarp - 1);
        if (all > 0) {
          int32_t taken = 0;
          if (lane == 0) {
            taken = atomic_add(&counts->taken, all);
          }
          taken = shuffle(taken, 0);
          waiting = taken + all < samples;
          if (wants && taken + before < samples) {
            sample = taken + before;
            is_fresh = 1;
          }
        }
      }
      const int is_active = sample >= 0, before = count_before(is_active);
      if (slot < plan.slots) {
        tile.samples[slot] = sample;
        tile.fresh[slot] = is_fresh;
      }
      if (is_active) {
        tile.active[active + before] = slot;
      }
      active += shuffle(before + is_active, kWarp - 1);
    }
    if (lane == 0) {
      at<DenseNotes>(plan.notes)->active = active;
    }
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
  FPI_DEVICE void read(const Tile& tile, int active) const {
    constexpr int kPack = kWidth<T>;
    const Access<T, kPack> access;
    const int lane = thread_index() % kWarp, n = static_cast<int>(dense.n);
    const Record<Acc>& mine = tile.solver.step.record;
    for (int i = thread_index() / kWarp; i < active; i += kDenseWarps) {
      const int slot = tile.active[i];
      const int64_t sample = tile.samples[slot];
      const bool is_fresh = tile.fresh[slot] != 0;
      T* state = tile.x + slot * tile.padded;
      T* operand = tile.operand + i * stride_of_k(dense.n);
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
        if (lane == 0 && record.floor != nullptr) {
          at<Acc>(plan.floor)[slot] = record.floor[sample];
        }
      }
    }
  }

  // One layer of g: to the hidden tile, or to g(x).
  FPI_DEVICE void multiply(const Tile& tile, int active, bool is_hidden) const {
    const DenseLayer<T>& layer = is_hidden ? dense.hidden : dense.output;
    const T* operand = is_hidden || !dense.has_hidden ? tile.operand : tile.hidden;
    const int kept = static_cast<int>(is_hidden ? plan.kept_hidden : plan.kept_output);
    const Weight<T> weight = {layer.weight,
                              at<T>(is_hidden ? plan.weight_hidden : plan.weight_output),
                              static_cast<int>(layer.out_stride),
                              stride_of_k(layer.in),
                              static_cast<int>(layer.out),
                              kept};
    const Acc residual = is_hidden ? Acc(0) : static_cast<Acc>(dense.residual);
    const int stride = stride_of_k(dense.n), hidden_stride = stride_of_k(dense.output.in);
    const auto take = [&](int i, int j, Acc value) {
      const int slot = tile.active[i];
      const int64_t sample = tile.samples[slot];
      const T* u = layer.u.of(sample);
      if (u != nullptr) {
        value += static_cast<Acc>(u[j]);
      }
      if (residual != Acc(0)) {
        value += residual * static_cast<Acc>(tile.operand[i * stride + j]);
      }
      const T* scale = is_hidden ? layer.scale.of(sample) : nullptr;
      if (scale != nullptr) {
        value *= static_cast<Acc>(scale[j]);
      } else {
        value = activated(layer.activation, value);
      }
      T* to = is_hidden ? tile.hidden + i * hidden_stride : tile.gx + slot * tile.padded;
      to[j] = static_cast<T>(value);
    };
    product<kMatrix>(Rows<T>{operand, stride_of_k(layer.in), active}, weight, at<T>(plan.panels),
                     take);
  }

  // The solver's step of every sample; and the result and record of those that end.
  FPI_DEVICE void advance(const Tile& tile, int active) const {
    const Team team = tile.solver.step.team();
    const Record<Acc>& mine = tile.solver.step.record;
    const int n = static_cast<int>(dense.n);
    for (int i = team.number; i < active; i += plan.rows.rows_per_block) {
      const int slot = tile.active[i];
      const int64_t sample = tile.samples[slot];
      T* state = tile.x + slot * tile.padded;
      const int64_t number = block_index() * plan.slots + slot;  // of its window
      const Row<T> row = {state,      tile.gx + slot * tile.padded, state, number, slot, 0, 0,
                          tile.padded};
      if (tile.solver.advance(team, row).active != 0) {
        continue;
      }
      team.barrier();
      for (int k = team.rank; k < n; k += team.size) {
        out[sample * n + k] = state[k];
      }
      if (team.rank < kCounters) {
        record.counters[sample * kCounters + team.rank] =
            mine.counters[slot * kCounters + team.rank];
      }
      if (team.rank < kScalars) {
        record.scalars[sample * kScalars + team.rank] = mine.scalars[slot * kScalars + team.rank];
      }
    }
  }

  // Brings the tally up to date: each block its failures, the last one the rest. By one warp.
  FPI_DEVICE void finish(const Ended& ended) const {
    const int32_t failed = Team::over_warp(ended.failed, Add{});
    const int32_t most = Team::over_warp(ended.most, Larger{});
    if (thread_index() != 0) {
      return;
    }
    atomic_add(tally + kFailed, failed);
    atomic_max(&counts->most, most);
    device_fence();
    if (atomic_add(&counts->done, 1) == grid_size() - 1) {
      device_fence();
      tally[kActiveRows] = 0;
      tally[kIteration] += load_uncached(&counts->most);
    }
  }
};

}  // namespace fpi::cuda
