// What BiCGSTAB makes of one product. The phases of a row's steps are in
// fpi_cuda/backends/krylov.py.
//
// Vectors of n that a row moves; those of the accumulate type are twice a half type's:
//   one launch (plans a, b)  after p: reads x, g(x), x′, g(x′), d, r; writes x, d, r, q: 10, and
//                            the second pass reads the six again, most of them from the cache.
//                            After s: p and q are read too, and p written: 12.
//   two launches (plan c)    the second pass is a launch of its own: 16 and 18.
// To judge an iterate takes 2, and where the recursion begins 6 are written.
#pragma once

#include "../../math/bicgstab.h"
#include "rows.cuh"

namespace fpi::cuda {

// So many values of the accumulate type, 16 bytes at a time.
template <typename Acc, int kCount>
struct Wide {
  static constexpr int kPart = kCount == 1 ? 1 : kPackBytes / static_cast<int>(sizeof(Acc));
  using Values = Pack<Acc, kCount>;

  FPI_DEVICE static Values load(const Acc* p) {
    Values all;
#pragma unroll
    for (int c = 0; c < kCount; c += kPart) {
      const auto part = Access<Acc, kPart>{}.load(p + c);
#pragma unroll
      for (int l = 0; l < kPart; ++l) {
        all.values[c + l] = part.values[l];
      }
    }
    return all;
  }

  FPI_DEVICE static void store(Acc* p, const Values& all) {
#pragma unroll
    for (int c = 0; c < kCount; c += kPart) {
      Pack<Acc, kPart> part;
#pragma unroll
      for (int l = 0; l < kPart; ++l) {
        part.values[l] = all.values[c + l];
      }
      Access<Acc, kPart>{}.store(p + c, part);
    }
  }
};

// A row's vectors, and what becomes of them.
template <typename T>
struct KrylovRow {
  using Acc = accumulate_t<T>;

  const Batch<T>& batch;
  const Team& team;
  const Row<T>& row;
  T *old, *old_g;
  Acc *d, *r, *p, *q;

  FPI_DEVICE KrylovRow(const Batch<T>& batch, const Krylov<T>& krylov, const Team& team,
                       const Row<T>& row)
      : batch(batch),
        team(team),
        row(row),
        old(krylov.state(row.sample, kBase, batch.n)),
        old_g(krylov.state(row.sample, kBaseValue, batch.n)),
        d(krylov.vector(row.sample, kBeyond, batch.n)),
        r(krylov.vector(row.sample, kRest, batch.n)),
        p(krylov.vector(row.sample, kP, batch.n)),
        q(krylov.vector(row.sample, kQ, batch.n)) {}

  // ‖g(x) − x‖² and ‖g(x)‖²
  FPI_DEVICE void squares(Acc (&sums)[kPicardSums]) const {
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      add_norms(sums, access.load(row.x + i), access.load(row.gx + i));
    });
  }

  FPI_DEVICE void products(Acc (&sums)[kKrylovSums], Acc inverse, Acc unit) const {
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      using W = Wide<Acc, access.kValues>;
      const auto xs = access.load(row.x + i), gs = access.load(row.gx + i);
      const auto olds = access.load(old + i), old_gs = access.load(old_g + i);
      const auto ds = W::load(d + i), rs = W::load(r + i);
#pragma unroll
      for (int l = 0; l < access.kValues; ++l) {
        add_products(sums, static_cast<Acc>(xs.values[l]), static_cast<Acc>(gs.values[l]),
                     static_cast<Acc>(olds.values[l]), static_cast<Acc>(old_gs.values[l]),
                     ds.values[l], rs.values[l], inverse, unit);
      }
    });
  }

  // x and the vectors, as the step says.
  FPI_DEVICE void move(const KrylovStep<Acc>& step) const {
    if (step.move == kEnd) {
      batch.damp_or_end(team, row, row.x, row.gx, step.status, Acc(1));
    } else if (step.move == kToBaseValue || step.move == kToBase || step.move == kToValue) {
      const T* to = step.move == kToValue ? row.gx : step.move == kToBase ? old : old_g;
      batch.copy(team, row, to, row.x);
    } else if (step.move == kBegin) {
      begin(step);
    } else if (step.move == kToSolution && step.length == Acc(0)) {
      solution(step);
    } else {
      take(step);
    }
  }

 private:
  FPI_DEVICE void begin(const KrylovStep<Acc>& step) const {
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      using W = Wide<Acc, access.kValues>;
      auto xs = access.load(row.x + i);
      const auto gs = access.load(row.gx + i);
      access.store(old + i, xs);
      access.store(old_g + i, gs);
      typename W::Values rest;
#pragma unroll
      for (int l = 0; l < access.kValues; ++l) {
        const Acc x = static_cast<Acc>(xs.values[l]);
        rest.values[l] = step.unit * (static_cast<Acc>(gs.values[l]) - x);
        xs.values[l] = static_cast<T>(x + step.tau * rest.values[l]);
      }
      W::store(d + i, {});
      W::store(r + i, rest);
      W::store(p + i, rest);
      access.store(row.x + i, xs);
    });
  }

  // Without a step: what g gave may be anything.
  FPI_DEVICE void solution(const KrylovStep<Acc>& step) const {
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      auto xs = access.load(old + i);
      const auto ds = Wide<Acc, access.kValues>::load(d + i);
#pragma unroll
      for (int l = 0; l < access.kValues; ++l) {
        xs.values[l] = static_cast<T>(static_cast<Acc>(xs.values[l]) + ds.values[l] / step.unit);
      }
      access.store(row.x + i, xs);
    });
  }

  FPI_DEVICE void take(const KrylovStep<Acc>& step) const {
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      using W = Wide<Acc, access.kValues>;
      auto xs = access.load(row.x + i);
      const auto gs = access.load(row.gx + i);
      const auto olds = access.load(old + i), old_gs = access.load(old_g + i);
      auto ds = W::load(d + i), rs = W::load(r + i);
      typename W::Values ps = {}, qs = {};
      if (step.move == kTakeS) {
        ps = W::load(p + i);
        qs = W::load(q + i);
      }
#pragma unroll
      for (int l = 0; l < access.kValues; ++l) {
        KrylovEntry<Acc, Acc> entry = {ds.values[l], rs.values[l], ps.values[l], qs.values[l]};
        xs.values[l] = static_cast<T>(
            entry.after(step, static_cast<Acc>(xs.values[l]), static_cast<Acc>(gs.values[l]),
                        static_cast<Acc>(olds.values[l]), static_cast<Acc>(old_gs.values[l])));
        ds.values[l] = entry.d;
        rs.values[l] = entry.r;
        ps.values[l] = entry.p;
        qs.values[l] = entry.q;
      }
      access.store(row.x + i, xs);
      if (step.move == kToSolution) {
        return;
      }
      W::store(d + i, ds);
      W::store(r + i, rs);
      if (step.move == kTakeP) {
        W::store(q + i, qs);
      } else {
        W::store(p + i, ps);
      }
    });
  }
};

// What a step is beside its status and move, where a window's weights are.
constexpr int kKrylovTerms = 5;
constexpr int kKrylovHistory = kKrylovTerms + 1;

template <typename Acc>
FPI_DEVICE KrylovStep<Acc> step_of(Move move, const Acc* terms) {
  return {move.status, move.differences, terms[0], terms[1], terms[2], terms[3], terms[4]};
}

template <typename T>
struct BicgstabStep {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = sizeof(T) == 2 ? 4 : 5;
  using Acc = accumulate_t<T>;

  Batch<T> batch;
  Krylov<T> krylov;

  FPI_DEVICE void operator()() const {
    batch.each_row([&](const Team& team, const Row<T>& row) { return advance(team, row); });
  }

  FPI_DEVICE Outcome advance(const Team& team, const Row<T>& row) const {
    const bool one_launch = batch.plan.parts == 1;
    const bool judged = batch.counters(row)[kWindow] == kIterate;
    const KrylovRow<T> vectors(batch, krylov, team, row);
    Acc* numbers = krylov.of(row.sample);
    Acc* sums = batch.shared_sums(team);
    if (judged) {
      Acc squares[kPicardSums] = {};
      vectors.squares(squares);
      team.reduce(squares, batch.stage(team), sums, Add{});
    } else {
      Acc products[kKrylovSums] = {};
      vectors.products(products, 1 / numbers[kStep], numbers[kUnit]);
      team.reduce(products, batch.stage(team), sums, Add{});
    }
    if (!one_launch && !batch.all_arrived(team, row, judged ? kPicardSums : kKrylovSums)) {
      return {};
    }
    typename Batch<T>::Norms norms = {};
    if (judged) {
      norms = batch.norms(team, row);
    }
    Acc* terms = batch.template team_shared<Acc>(team, batch.shared.gamma);
    if (team.rank == 0) {
      const auto step =
          judged ? after_iterate(norms.residual, norms.value, row.sample, batch.record, numbers)
                 : after_direction<T>(sums, row.sample, batch.record, numbers);
      announce(team, row, step, terms);
    }
    team.barrier();
    const KrylovStep<Acc> step = step_of(*batch.shared_move(team), terms);
    if (one_launch) {
      vectors.move(step);
    }
    return {1, step.status == kActive, step.status > kConverged};
  }

  // One thread tells its team, and with several blocks a row the second launch.
  FPI_DEVICE void announce(const Team& team, const Row<T>& row, const KrylovStep<Acc>& step,
                           Acc* terms) const {
    const Acc values[kKrylovTerms] = {step.length, step.factor, step.inverse, step.tau, step.unit};
#pragma unroll
    for (int i = 0; i < kKrylovTerms; ++i) {
      terms[i] = values[i];
      if (batch.plan.parts > 1) {
        batch.gamma[row.number * kKrylovTerms + i] = values[i];
      }
    }
    batch.announce(team, row, {step.status, step.move});
  }
};

// The second launch of plan c.
template <typename T>
struct BicgstabMove {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = sizeof(T) == 2 ? 4 : 5;

  Batch<T> batch;
  Krylov<T> krylov;

  FPI_DEVICE void operator()() const {
    const Team team = batch.team();
    const Row<T> row = batch.row_of(team, grid_size() - 1 - block_index());
    const Move move = batch.moves[row.number];
    if (move.status != kFrozen) {
      KrylovRow<T>(batch, krylov, team, row)
          .move(step_of(move, batch.gamma + row.number * kKrylovTerms));
    }
  }
};

}  // namespace fpi::cuda
