// One Picard step.
//
// Vectors of n that a row moves:
//   one launch (plans a, b)  reads x, g(x); writes x: 3 at any β. The second pass reads the
//                            copies in shared memory.
//   two launches (plan c)    reads x, g(x); then reads g(x), writes x: 4 at β = 1, else reads x
//                            too: 5.
// A row that ends writes out too; one that has ended costs nothing.
#pragma once

#include "rows.cuh"

namespace fpi::cuda {

template <typename T>
struct PicardStep {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = 8;
  static constexpr bool kHasWindow = false;
  using Acc = accumulate_t<T>;

  Batch<T> batch;

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
#pragma unroll
      for (int l = 0; l < access.kValues; ++l) {
        const Acc g = static_cast<Acc>(gs.values[l]);
        const Acc r = g - static_cast<Acc>(xs.values[l]);
        squares[0] += r * r;
        squares[1] += g * g;
      }
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

    const Acc residual = batch.residual_norm(team, row, sums[0]);
    const Acc value = batch.value_norm(team, row, sums[1]);
    if (team.rank == 0) {
      const int32_t k = iteration_of(row.sample, batch.record);
      batch.scalars(row)[kRing + (k - 1) % kRingLength] = residual;
      batch.announce(team, row, {stop(residual, value, row.sample, batch.record), 0});
    }
    team.barrier();
    const int32_t status = batch.shared_move(team)->status;
    if (one_launch) {
      batch.damp_or_end(team, row, shared_x, shared_g, status);
    }
    return {1, status == kActive, status > kConverged};
  }
};

// The second launch of plan c: moves the rows. Rows that the first launch had last come first,
// which may still be in the cache.
template <typename T>
struct PicardMove {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = 8;

  Batch<T> batch;

  FPI_DEVICE void operator()() const {
    const Team team = batch.team();
    const Row<T> row = batch.row_of(team, grid_size() - 1 - block_index());
    const Move move = batch.moves[row.number];
    if (move.status != kFrozen) {
      batch.damp_or_end(team, row, row.x, row.gx, move.status);
    }
  }
};

}  // namespace fpi::cuda
