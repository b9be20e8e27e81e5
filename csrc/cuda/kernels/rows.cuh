// What the step kernels do with their rows, whatever the solver.
#pragma once

#include "../../math/progress.h"
#include "pack.cuh"

namespace fpi::cuda {

// What a step makes of a row.
struct Move {
  int32_t status;  // after this step, or kFrozen
  // Anderson: in the mixture; 0 is a damped step, and below that x is taken back. Picard: 1 and the
  // slot of the trail that x goes to, or 0.
  int32_t differences;
  int32_t halvings = 0;  // Anderson: of beta
};

constexpr int32_t kFrozen = -1;  // ended in an earlier step, and is left alone

// What a team tells the tally; nothing if another block will bring the row to its end.
struct Outcome {
  int32_t rows, active, failed;
};

// What the teams of a block tell each other, in its shared memory.
struct BlockShared {
  Outcome outcomes[kStepWarps];
  int32_t is_last;
};
static_assert(sizeof(BlockShared) <= kBlockSharedBytes);

// A row, and the part of it that this team works on.
template <typename T>
struct Row {
  T* x;
  const T* gx;
  T* out;
  int64_t number;  // in x
  int64_t sample;
  int64_t part;
  int64_t begin, end;
};

// Adds a pack's terms of ‖g(x) − x‖² and ‖g(x)‖².
template <typename Acc, typename T, int kValues>
FPI_DEVICE void add_norms(Acc (&squares)[kPicardSums], const Pack<T, kValues>& xs,
                          const Pack<T, kValues>& gs) {
#pragma unroll
  for (int l = 0; l < kValues; ++l) {
    const Acc g = static_cast<Acc>(gs.values[l]);
    const Acc r = g - static_cast<Acc>(xs.values[l]);
    squares[0] += r * r;
    squares[1] += g * g;
  }
}

// The slot of the newest iterate. Whatever the counter holds, it is one of the ring's.
FPI_DEVICE int newest_slot(const int32_t* counters, int length) {
  return static_cast<int>(static_cast<uint32_t>(counters[kHead]) % static_cast<uint32_t>(length));
}

// The rows that a step operator works on, and how they are laid over blocks and memory.
template <typename T>
struct Batch {
  using Acc = accumulate_t<T>;

  T* x;         // [rows, n]
  const T* gx;  // [rows, n]
  T* out;       // [B, n]
  int64_t rows, n;
  Acc beta;
  Record<Acc> record;
  int32_t* tally;
  bool aligned;  // every vector begins at a multiple of 16 bytes and ends with a whole pack
  Plan plan;
  TeamShared shared;  // offsets
  int sums;           // of a row
  // Scratch of plan.h
  int32_t* counts;  // rows done, still active, failed
  int32_t* arrivals;
  Move* moves;
  Acc* gamma;
  Acc* partials;

  FPI_DEVICE Team team() const { return Team::of(plan.team); }

  // A first launch: advance(team, row) if the row is active; what comes of it goes to the tally.
  template <typename Advance>
  FPI_DEVICE void each_row(const Advance& advance) const {
    const Team team = this->team();
    const Row<T> row = row_of(team, block_index());
    Outcome outcome = {};
    if (row.number < rows) {
      outcome = counters(row)[kStatus] == kActive ? advance(team, row) : leave(team, row);
    }
    count(team, outcome);
  }

  // The row of this team; its number is beyond the last if there is none.
  FPI_DEVICE Row<T> row_of(const Team& team, int64_t block) const {
    // A grid has fewer than 2^31 blocks, and short divisions are fast.
    const auto place = static_cast<uint32_t>(block), parts = static_cast<uint32_t>(plan.parts);
    const int64_t number = static_cast<int64_t>(place / parts) * plan.rows_per_block + team.number;
    const int64_t part = place % parts, begin = part * plan.span;
    const int64_t end = begin + plan.span < n ? begin + plan.span : n;
    const int64_t sample = number < rows ? sample_of(number, record) : 0;
    const int64_t offset = number * n;
    return {.x = x + offset,
            .gx = gx + offset,
            .out = out + sample * n,
            .number = number,
            .sample = sample,
            .part = part,
            .begin = begin,
            .end = end};
  }

  FPI_DEVICE int32_t* counters(const Row<T>& row) const {
    return record.counters + row.sample * kCounters;
  }
  FPI_DEVICE Acc* scalars(const Row<T>& row) const {
    return record.scalars + row.sample * kScalars;
  }

  FPI_DEVICE static BlockShared* block_shared() {
    return reinterpret_cast<BlockShared*>(shared_memory());
  }

  template <typename Item>
  FPI_DEVICE Item* team_shared(const Team& team, int offset) const {
    return reinterpret_cast<Item*>(shared_memory() + kBlockSharedBytes +
                                   team.number * shared.bytes + offset);
  }
  FPI_DEVICE Move* shared_move(const Team& team) const { return team_shared<Move>(team, 0); }
  FPI_DEVICE Acc* shared_sums(const Team& team) const {
    return team_shared<Acc>(team, shared.sums);
  }
  FPI_DEVICE Acc* stage(const Team& team) const { return team_shared<Acc>(team, shared.stage); }

  // In one launch, the copies of two of the row's vectors.
  FPI_DEVICE T* shared_vector(const Team& team, int which) const {
    return team_shared<T>(team, shared.vectors) +
           which * ((shared.bytes - shared.vectors) / 2 / sizeof(T));
  }

  // Leaves a row alone that ended in an earlier step. Its first block counts it.
  FPI_DEVICE Outcome leave(const Team& team, const Row<T>& row) const {
    if (plan.parts > 1 && row.part == 0 && team.rank == 0) {
      moves[row.number] = {kFrozen, 0};
    }
    return {row.part == 0, 0, 0};
  }

  // With several blocks a row: hands in the sums of this part. The last block to do so gets true,
  // and has the sums of the whole row in its shared memory; parts are added in their order.
  FPI_DEVICE bool all_arrived(const Team& team, const Row<T>& row, int used) const {
    Acc* mine = shared_sums(team);
    Acc* all = partials_of(row);
    for (int i = team.rank; i < used; i += team.size) {
      all[i * plan.parts + row.part] = mine[i];
    }
    block_barrier();
    if (team.rank == 0) {
      device_fence();
      block_shared()->is_last = atomic_add(arrivals + row.number, 1) == plan.parts - 1;
      device_fence();
    }
    block_barrier();
    if (!block_shared()->is_last) {
      return false;
    }
    join_parts(team, row, used, mine);
    return true;
  }

  // What the parts' blocks have handed in of a row: [sums][parts].
  FPI_DEVICE Acc* partials_of(const Row<T>& row) const {
    return partials + row.number * sums * plan.parts;
  }

  // The parts' sums, added in their order: to joined, and seen by all after.
  FPI_DEVICE void join_parts(const Team& team, const Row<T>& row, int used, Acc* joined) const {
    const Acc* all = partials_of(row);
    for (int i = team.warp(); i < used; i += team.warps()) {
      Acc sum = 0;
#pragma unroll 8
      for (int64_t part = team.lane(); part < plan.parts; part += kWarp) {
        sum += load_uncached(all + i * plan.parts + part);
      }
      sum = Team::over_warp(sum, Add{});
      if (team.lane() == 0) {
        joined[i] = sum;
      }
    }
    team.barrier();
  }

  // What follows takes a whole row by one team, with several blocks a row by the last one, and a
  // value at a time: that needs few registers, and is seldom.

  // Sums to which add(sums, i) adds the terms of entry i, in the order in which a first launch
  // adds: the same values times a power of two have the same sums to the bit, but for the exponent.
  template <int kCount, typename AddTerms>
  FPI_DEVICE void whole_sums(const Team& team, const Row<T>& row, Acc* joined,
                             const AddTerms& add) const {
#pragma unroll 1
    for (int64_t part = 0; part < plan.parts; ++part) {
      const int64_t begin = part * plan.span, end = begin + plan.span < n ? begin + plan.span : n;
      Acc mine[kCount] = {};
      for_packs<T>(team, begin, end, false, [&](int64_t i, auto) { add(mine, i); });
      team.reduce(mine, stage(team), joined, Add{});
      if (plan.parts > 1 && team.rank < kCount) {  // who wrote it
        partials_of(row)[team.rank * plan.parts + part] = joined[team.rank];
      }
    }
    if (plan.parts > 1) {
      team.barrier();
      join_parts(team, row, kCount, joined);
    }
  }

  // The largest of |entry(i)|, the first that is not finite if there is one.
  template <typename Entry>
  FPI_DEVICE Acc largest(const Team& team, const Entry& entry) const {
    Acc mine[1] = {0};
#pragma unroll 1
    for (int64_t i = team.rank; i < n; i += team.size) {
      const Acc value = entry(i);
      mine[0] = Larger{}(mine[0], value < 0 ? -value : value);
    }
    Acc* joined = behind_stage(team, 1);
    team.reduce(mine, stage(team), joined, Larger{});
    const Acc all = *joined;
    team.barrier();
    return all;
  }

  // Room for as many sums beside the stage that reduces so many, at most half of it: those of the
  // step are still wanted.
  FPI_DEVICE Acc* behind_stage(const Team& team, int count) const {
    return stage(team) + count * team.warps();
  }

  // ‖g(x) − x‖ and ‖g(x)‖, from the first two sums of a step.
  struct Norms {
    Acc residual, value;
  };
  FPI_DEVICE Norms norms(const Team& team, const Row<T>& row) const {
    const Acc* squares = shared_sums(team);
    return {norm(team, row, squares[0], Acc(1)), norm(team, row, squares[1], Acc(0))};
  }

  // ‖g(x) − part x‖ from its squares; see norm_of. All of the team call it.
  FPI_DEVICE Acc norm(const Team& team, const Row<T>& row, Acc squares, Acc part) const {
    const auto entry = [&](int64_t i) {
      const Acc g = static_cast<Acc>(row.gx[i]);
      return part == Acc(0) ? g : g - static_cast<Acc>(row.x[i]);
    };
    return norm_of(
        squares, [&] { return largest(team, entry); },
        [&](Acc scale) {
          Acc* joined = behind_stage(team, 1);
          whole_sums<1>(team, row, joined, [&](Acc(&sum)[1], int64_t i) {
            const Acc scaled = scale * entry(i);
            sum[0] += scaled * scaled;
          });
          const Acc all = *joined;
          team.barrier();
          return all;
        });
  }

  // One thread tells its team, and with several blocks a row the second launch.
  FPI_DEVICE void announce(const Team& team, const Row<T>& row, Move move) const {
    *shared_move(team) = move;
    if (plan.parts > 1) {
      moves[row.number] = move;
    }
  }

  // An active row's damped step, or the end of one that is finished: its result, to out and to its
  // row of x, where it stays from now on, is g(x), or the last finite iterate where g(x) is not
  // finite. old and value are x and g(x), or copies of them.
  FPI_DEVICE void damp_or_end(const Team& team, const Row<T>& row, const T* old, const T* value,
                              int32_t status, Acc beta) const {
    const bool ends = status != kActive;
    if (ends || beta == Acc(1)) {
      const T* result = status == kNonfinite ? old : value;
      for_packs<T>(team, row.begin, row.end, aligned, [&](int64_t i, auto access) {
        const auto pack = access.load(result + i);
        access.store(row.x + i, pack);
        if (ends) {
          access.store(row.out + i, pack);
        }
      });
      return;
    }
    for_packs<T>(team, row.begin, row.end, aligned, [&](int64_t i, auto access) {
      access.store(row.x + i, damped(access.load(old + i), access.load(value + i), beta));
    });
  }

  // This team's part of one of the row's vectors to another.
  FPI_DEVICE void copy(const Team& team, const Row<T>& row, const T* from, T* to) const {
    for_packs<T>(team, row.begin, row.end, aligned,
                 [&](int64_t i, auto access) { access.store(to + i, access.load(from + i)); });
  }

  // Brings the tally up to date once all rows are done.
  // All threads of the block call it.
  FPI_DEVICE void count(const Team& team, Outcome outcome) const {
    if (team.rank == 0) {
      block_shared()->outcomes[team.number] = outcome;
    }
    block_barrier();
    if (thread_index() != 0) {
      return;
    }
    Outcome all = {};
    for (int t = 0; t < plan.rows_per_block; ++t) {
      all.rows += block_shared()->outcomes[t].rows;
      all.active += block_shared()->outcomes[t].active;
      all.failed += block_shared()->outcomes[t].failed;
    }
    if (all.rows == 0 && rows > 0) {
      return;
    }
    atomic_add(counts + 1, all.active);
    if (all.failed != 0) {  // seldom, and every block would add at the same address
      atomic_add(counts + 2, all.failed);
    }
    device_fence();
    if (atomic_add(counts, all.rows) + all.rows == rows) {
      device_fence();
      tally[kActiveRows] = load_uncached(counts + 1);
      tally[kFailed] += load_uncached(counts + 2);
      ++tally[kIteration];
    }
  }
};

}  // namespace fpi::cuda
