// One Picard step.
//
// Vectors of n that a row moves:
//   one launch (plans a, b)  reads x, g(x); writes x: 3 at any β. The second pass reads the
//                            copies in shared memory.
//   two launches (plan c)    reads x, g(x); then reads g(x), writes x: 4 at β = 1, else reads x
//                            too: 5.
// Where x is kept, in about one of four iterations, it is written to the trail too: 1 more; in two
// launches at β = 1, where the second did not read it, 2. A row that ends writes out too, and reads
// x, g(x) and the trail for what they say of g; one that has ended costs nothing.
#pragma once

#include "../../math/picard.h"
#include "rows.cuh"

namespace fpi::cuda {

// x to the trail, where it is kept. old: x, or a copy of it.
template <typename T>
FPI_DEVICE void keep(const Batch<T>& batch, const Trail<T>& trail, const Team& team,
                     const Row<T>& row, const T* old, Move move) {
  if (trail.states != nullptr && move.differences > 0) {
    batch.copy(team, row, old, trail.state(row.number, row.sample, move.differences - 1, batch.n));
  }
}

template <typename T>
struct PicardStep {
  static constexpr int kThreads = kStepThreads;
  using Acc = accumulate_t<T>;
  static constexpr int kBlocks = sizeof(Acc) == 8 ? 7 : 8;  // to measure a row takes 72 registers
  static constexpr bool kHasWindow = false;

  Batch<T> batch;
  Trail<T> trail;

  FPI_DEVICE void operator()() const {
    batch.each_row([&](const Team& team, const Row<T>& row) { return advance(team, row); });
  }

  FPI_DEVICE Outcome advance(const Team& team, const Row<T>& row) const {
    const bool one_launch = batch.plan.parts == 1;
    T* shared_x = batch.shared_vector(team, 0);
    T* shared_g = batch.shared_vector(team, 1);

    Acc squares[kPicardSums] = {};  // ‖g(x) − x‖², ‖g(x)‖²
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      const auto xs = access.load(row.x + i);
      const auto gs = access.load(row.gx + i);
      add_norms(squares, xs, gs);
      if (one_launch) {
        access.store(shared_x + i, xs);
        access.store(shared_g + i, gs);
      }
    });
    Acc* sums = batch.shared_sums(team);
    team.reduce(squares, batch.stage(team), sums, Add{});
    if (!one_launch && !batch.all_arrived(team, row, kPicardSums)) {
      return {};
    }

    const auto [residual, value] = batch.norms(team, row);
    if (team.rank == 0) {
      const auto [status, keeps] = decide(residual, value, batch.beta, row.sample, batch.record);
      batch.announce(team, row,
                     {status, keeps ? 1 + newest_slot(batch.counters(row), kTrailLength) : 0});
    }
    team.barrier();
    const Move move = *batch.shared_move(team);
    if (trail.states != nullptr && has_trail(move.status, row.sample, batch.record)) {
      measure_row(team, row);
    }
    if (one_launch) {
      keep(batch, trail, team, row, shared_x, move);
      batch.damp_or_end(team, row, shared_x, shared_g, move.status, batch.beta);
    }
    return {1, move.status == kActive, move.status > kConverged};
  }

  // What the last iterates of a row that ends say of g: of all of it, by this team alone.
  FPI_DEVICE void measure_row(const Team& team, const Row<T>& row) const {
    const int newest = newest_slot(batch.counters(row), kTrailLength);
    const int older = batch.counters(row)[kWindow] > 1 ? 1 - newest : newest;
    const T* x1 = trail.state(row.number, row.sample, newest, batch.n);
    const T* x2 = trail.state(row.number, row.sample, older, batch.n);
    const Acc* scalars = batch.scalars(row);
    const Acc scale = scale_for(scalars[kResidual]);
    Acc terms[kTrailSums] = {};
#pragma unroll 1
    for (int64_t i = team.rank; i < batch.n; i += team.size) {
      add_differences<true>(terms, static_cast<Acc>(row.x[i]), static_cast<Acc>(row.gx[i]),
                            static_cast<Acc>(x1[i]), static_cast<Acc>(x2[i]), batch.beta, scale);
    }
    Acc* sums = batch.shared_sums(team);
    team.reduce(terms, batch.stage(team), sums, Add{});
    if (team.rank == 0) {
      measure(sums, batch.beta, scale * noise_of<T>(scalars[kValue]), row.sample, batch.record);
    }
  }
};

// The second launch of plan c: moves the rows. Rows that the first launch had last come first,
// which may still be in the cache.
template <typename T>
struct PicardMove {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = 8;

  Batch<T> batch;
  Trail<T> trail;

  FPI_DEVICE void operator()() const {
    const Team team = batch.team();
    const Row<T> row = batch.row_of(team, grid_size() - 1 - block_index());
    const Move move = batch.moves[row.number];
    if (move.status != kFrozen) {
      keep(batch, trail, team, row, row.x, move);
      batch.damp_or_end(team, row, row.x, row.gx, move.status, batch.beta);
    }
  }
};

}  // namespace fpi::cuda
