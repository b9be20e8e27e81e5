// One Anderson step.
//
// Vectors of n that a row moves, window of m full:
//   one launch (plans a, b)  reads x, g(x), the value before and m−1 residuals (m+2), writes the
//                            value and the residual (2); reads m−2 older values, writes x (m−1):
//                            2m+3 at β = 1. The newest two values come from shared memory.
//   two launches (plan c)    the same m+4; then reads m values, writes x (m+1): 2m+5 at β = 1. That
//                            is one more than the least that two launches need: the secant ratio
//                            wants the value before beside the residual before, and the mixture
//                            wants it again.
// The mixture at β ≠ 1 reads the m residuals too. A pass takes 4·kGroups differences; for each
// further pass three residuals are read again: m > 17. A row that ends writes out too and stops at
// that; one that has ended costs nothing.
#pragma once

#include <type_traits>

#include "../../math/anderson.h"
#include "rows.cuh"

namespace fpi::cuda {

// One sample's window.
template <typename T>
struct Ring {
  T* values;     // [m, n]
  T* residuals;  // [m, n]
  int64_t n;
  int m;
  int head;

  FPI_DEVICE int slot(int age) const { return slot_of(age, head, m); }
  FPI_DEVICE T* value(int age) const { return values + slot(age) * n; }
  FPI_DEVICE T* residual(int age) const { return residuals + slot(age) * n; }
};

template <typename T>
FPI_DEVICE Ring<T> ring_of(const Window<T>& window, const Row<T>& row, int64_t n, int head) {
  const int64_t offset = window.place(row.number, row.sample) * window.m * n;
  return {window.values + offset, window.residuals + offset, n, window.m, head};
}

// The mixture of count ≥ 1 differences, to x. newest and previous are g_0 and g_1, or copies of
// them.
template <typename T>
FPI_DEVICE void mix(const Team& team, const Row<T>& row, const Ring<T>& ring, const T* newest,
                    const T* previous, int count, const accumulate_t<T>* gamma,
                    accumulate_t<T> beta, bool aligned) {
  using Acc = accumulate_t<T>;
  for_packs<T>(team, row.begin, row.end, aligned, [&](int64_t i, auto access) {
    constexpr int kValues = access.kValues;
    // v_0 − Σ γ_j (v_j − v_{j+1})
    const auto combined = [&](const T* v_0, const T* v_1, const T* vectors) {
      Pack<Acc, kValues> younger = widened<Acc>(access.load(v_0 + i)), sum = younger;
      for (int first = 0; first < count; first += kGroup) {
        Pack<T, kValues> older[kGroup];
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {  // beyond the last: the last again
          const int age = first + c < count ? first + c + 1 : count;
          older[c] = access.load((age == 1 ? v_1 : vectors + ring.slot(age) * ring.n) + i);
        }
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
          const Acc weight = first + c < count ? gamma[first + c] : Acc(0);
#pragma unroll
          for (int l = 0; l < kValues; ++l) {
            mix_in(sum.values[l], younger.values[l], weight, static_cast<Acc>(older[c].values[l]));
          }
        }
      }
      return sum;
    };
    Pack<Acc, kValues> mixed = combined(newest, previous, ring.values);
    if (beta != Acc(1)) {
      const auto least = combined(ring.residual(0), ring.residual(1), ring.residuals);
#pragma unroll
      for (int l = 0; l < kValues; ++l) {
        mixed.values[l] = damped_mixture(mixed.values[l], least.values[l], beta);
      }
    }
    access.store(row.x + i, widened<T>(mixed));
  });
}

static_assert(anderson_sums(1) == kAndersonNorms);

// kGroup, as a constant that unrolls loops.
struct GroupSize {
  FPI_HOST_DEVICE constexpr operator int() const { return kGroup; }
};

// kGroups: groups of four differences that one pass takes.
template <typename T, int kGroups>
struct AndersonStep {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = kGroups == 1 ? 4 : 2;
  static constexpr bool kHasWindow = true;
  using Acc = accumulate_t<T>;

  // Of a pass; of every group d_0 · d_j, then r_0 · d_j.
  struct Sums {
    Acc squares[kAndersonNorms];
    Acc dots[kGroups][2 * kGroup];
  };

  Batch<T> batch;
  Window<T> window;
  Acc ridge, restart;

  FPI_DEVICE void operator()() const {
    batch.each_row([&](const Team& team, const Row<T>& row) { return advance(team, row); });
  }

  FPI_DEVICE Outcome advance(const Team& team, const Row<T>& row) const {
    const bool one_launch = batch.plan.parts == 1;
    const int m = window.m;
    const int seen = batch.counters(row)[kWindow];  // iterates in the window, before this one
    const Ring<T> ring = ring_of(window, row, batch.n, (batch.counters(row)[kHead] + 1) % m);
    const int count = seen < m ? seen : m - 1;  // differences, if the window is not restarted

    gather(team, row, ring, count);
    push(team, row, ring, seen, count);
    if (!one_launch && !batch.all_arrived(team, row, anderson_sums(count + 1))) {
      return {};
    }
    const Acc* sums = batch.shared_sums(team);
    const Acc residual = batch.residual_norm(team, row, sums[kResidualSquares]);
    const Acc value = batch.value_norm(team, row, sums[kValueSquares]);
    if (team.rank == 0) {
      batch.announce(team, row, decision(team, row, ring, residual, value));
    }
    team.barrier();
    const Move move = *batch.shared_move(team);
    Acc* gamma = batch.template team_shared<Acc>(team, batch.shared.gamma);
    if (!one_launch) {
      for (int j = team.rank; j < move.differences; j += team.size) {
        batch.gamma[row.number * (m - 1) + j] = gamma[j];
      }
    } else if (move.differences > 0) {
      mix(team, row, ring, batch.shared_vector(team, 0), batch.shared_vector(team, 1),
          move.differences, gamma, batch.beta, batch.aligned);
    } else {
      batch.damp_or_end(team, row, row.x, batch.shared_vector(team, 0), move.status);
    }
    return {1, move.status == kActive, move.status > kConverged};
  }

  FPI_DEVICE Acc* gram_of(const Row<T>& row) const {
    return window.gram + window.place(row.number, row.sample) * window.m * window.m;
  }

  // The older rows of the Gram matrix, to shared memory: its row of this iterate is yet to come.
  FPI_DEVICE void gather(const Team& team, const Row<T>& row, const Ring<T>& ring,
                         int count) const {
    const Acc* gram = gram_of(row);
    Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
    for (int e = team.rank; e < count * count; e += team.size) {
      const int i = e / count, j = e % count;
      if (0 < j && j <= i) {
        system[e] = gram[ring.slot(i) * window.m + ring.slot(j)];
      }
    }
  }

  // Stores g(x) and its residual, and takes the sums that need them.
  FPI_DEVICE void push(const Team& team, const Row<T>& row, const Ring<T>& ring, int seen,
                       int count) const {
    const bool one_launch = batch.plan.parts == 1;
    // Where there is none before, anything that can be read will do: those sums are not used.
    const T* previous_value = seen > 0 ? ring.value(1 % window.m) : row.gx;
    T* new_value = ring.value(0);
    T* new_residual = ring.residual(0);
    T* shared_new = batch.shared_vector(team, 0);
    T* shared_previous = batch.shared_vector(team, 1);
    const auto residual_of = [&](int age) -> const T* {
      const int last = count > 0 ? count : 1 % window.m;
      return seen > 0 ? ring.residual(age < last ? age : last) : row.x;
    };

    Sums sums = {};
    for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
      constexpr int kValues = access.kValues;
      const auto xs = access.load(row.x + i);
      const auto gs = access.load(row.gx + i);
      const auto before = access.load(previous_value + i);
      Pack<T, kValues> older[kGroup], rs;
      load_group(older, 0, residual_of, i, access);
      Differences<kValues> d;
#pragma unroll
      for (int l = 0; l < kValues; ++l) {
        const Acc g = static_cast<Acc>(gs.values[l]);
        const Acc r = g - static_cast<Acc>(xs.values[l]);
        const Acc dg = g - static_cast<Acc>(before.values[l]);
        const Acc dx = dg - (r - static_cast<Acc>(older[0].values[l]));
        sums.squares[kResidualSquares] += r * r;
        sums.squares[kValueSquares] += g * g;
        sums.squares[kValueSecant] += dg * dg;
        sums.squares[kStateSecant] += dx * dx;
        rs.values[l] = static_cast<T>(r);
        d.newest.values[l] = d.younger.values[l] = static_cast<Acc>(rs.values[l]);
        d.first.values[l] = d.newest.values[l] - static_cast<Acc>(older[0].values[l]);
      }
      dot_group(sums.dots[0], older, d);
      more_groups(sums, 0, count, residual_of, i, access, d);
      access.store(new_value + i, gs);
      access.store(new_residual + i, rs);
      if (one_launch) {
        access.store(shared_new + i, gs);
        access.store(shared_previous + i, before);
      }
    });
    Acc* all = batch.shared_sums(team);
    team.reduce(sums.squares, batch.stage(team), all, Add{});
    reduce_dots(team, sums, 0, count);

    for (int first = kGroups * kGroup; first < count; first += kGroups * kGroup) {
      sums = {};
      for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
        constexpr int kValues = access.kValues;
        Differences<kValues> d;
        d.newest = widened<Acc>(access.load(new_residual + i));
        d.first = widened<Acc>(access.load(residual_of(1) + i));
        d.younger = widened<Acc>(access.load(residual_of(first) + i));
#pragma unroll
        for (int l = 0; l < kValues; ++l) {
          d.first.values[l] = d.newest.values[l] - d.first.values[l];
        }
        Pack<T, kValues> older[kGroup];
        load_group(older, first, residual_of, i, access);
        dot_group(sums.dots[0], older, d);
        more_groups(sums, first, count, residual_of, i, access, d);
      });
      reduce_dots(team, sums, first, count);
    }
  }

  // Of the values that a thread has at hand: r_0, d_0, and the last residual read.
  template <int kValues>
  struct Differences {
    Pack<Acc, kValues> newest, first, younger;
  };

  // The residuals of ages first + 1 to first + 4; beyond the last, the last again.
  template <typename ResidualOf, typename Access, int kValues>
  FPI_DEVICE static void load_group(Pack<T, kValues> (&older)[kGroup], int first,
                                    const ResidualOf& residual_of, int64_t i, Access access) {
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
      older[c] = access.load(residual_of(first + c + 1) + i);
    }
  }

  template <int kValues>
  FPI_DEVICE static void dot_group(Acc (&dots)[2 * kGroup], const Pack<T, kValues> (&older)[kGroup],
                                   Differences<kValues>& d) {
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
#pragma unroll
      for (int l = 0; l < kValues; ++l) {
        const Acc old = static_cast<Acc>(older[c].values[l]);
        const Acc difference = d.younger.values[l] - old;
        dots[c] += d.first.values[l] * difference;
        dots[kGroup + c] += d.newest.values[l] * difference;
        d.younger.values[l] = old;
      }
    }
  }

  // The groups of a pass after its first.
  template <typename ResidualOf, typename Access, int kValues>
  FPI_DEVICE static void more_groups(Sums& sums, int first, int count,
                                     const ResidualOf& residual_of, int64_t i, Access access,
                                     Differences<kValues>& d) {
#pragma unroll
    for (int group = 1; group < kGroups; ++group) {
      if (first + group * kGroup < count) {
        Pack<T, kValues> older[kGroup];
        load_group(older, first + group * kGroup, residual_of, i, access);
        dot_group(sums.dots[group], older, d);
      }
    }
  }

  FPI_DEVICE void reduce_dots(const Team& team, const Sums& sums, int first, int count) const {
    Acc* all = batch.shared_sums(team) + kAndersonNorms + 2 * first;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (first + group * kGroup < count) {
        team.reduce(sums.dots[group], batch.stage(team), all + group * 2 * kGroup, Add{});
      }
    }
  }

  // The record after this step, the new row of the Gram matrix, and the weights, by one thread.
  FPI_DEVICE Move decision(const Team& team, const Row<T>& row, const Ring<T>& ring, Acc residual,
                           Acc value) const {
    const Acc* sums = batch.shared_sums(team);
    const auto [status, used] =
        decide(residual, value, sums, restart, window.m, row.sample, batch.record);
    if (status != kActive) {
      return {status, 0};
    }
    Acc* gram = gram_of(row);
    Acc* gamma = batch.template team_shared<Acc>(team, batch.shared.gamma);
    Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
    for (int j = 0; j < used; ++j) {
      const Acc* group = sums + kAndersonNorms + j / kGroup * 2 * kGroup;
      const Acc dot = group[j % kGroup];
      // Kept by slot, so that nothing else moves.
      gram[ring.head * window.m + ring.slot(j)] = dot;
      gram[ring.slot(j) * window.m + ring.head] = dot;
      system[j * used] = dot;
      gamma[j] = group[kGroup + j % kGroup];
    }
    const bool is_solved = used > 0 && solve(used, system, gamma, noise_of<T>(value));
    return {status, update_window(batch.counters(row), ring.head, used, is_solved)};
  }

  // gamma from the right-hand side; see ridge_solve.
  FPI_DEVICE bool solve(int count, Acc* system, Acc* gamma, Acc noise) const {
    Acc trace = 0;
    for (int i = 0; i < count; ++i) {
      trace += system[i * count + i];
    }
    if constexpr (kGroups == 1) {  // in registers, padded to four differences
      Acc a[kGroup * kGroup], b[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          a[i * kGroup + j] = i < count ? system[i * count + j] : Acc(i == j);
        }
        b[i] = i < count ? gamma[i] : Acc(0);
      }
      const bool solved = ridge_solve(GroupSize{}, a, b, trace, ridge, noise);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < count) {
          gamma[i] = b[i];
        }
      }
      return solved;
    } else {
      return ridge_solve(count, system, gamma, trace, ridge, noise);
    }
  }
};

// The second launch of plan c: moves the rows. Rows that the first launch had last come first,
// which may still be in the cache.
template <typename T>
struct AndersonMove {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = 5;

  Batch<T> batch;
  Window<T> window;

  FPI_DEVICE void operator()() const {
    const Team team = batch.team();
    const Row<T> row = batch.row_of(team, grid_size() - 1 - block_index());
    const Move move = batch.moves[row.number];
    if (move.differences > 0) {
      const Ring<T> ring = ring_of(window, row, batch.n, batch.counters(row)[kHead]);
      mix(team, row, ring, row.gx, ring.value(1), move.differences,
          batch.gamma + row.number * (window.m - 1), batch.beta, batch.aligned);
    } else if (move.status != kFrozen) {
      batch.damp_or_end(team, row, row.x, row.gx, move.status);
    }
  }
};

// Calls run with the kGroups for a history of m, as a constant: small windows need few registers,
// which leaves room for more rows at a time.
template <typename Run>
void with_groups(int m, const Run& run) {
  if (m - 1 <= kGroup) {
    run(std::integral_constant<int, 1>{});
  } else {
    run(std::integral_constant<int, 4>{});
  }
}

}  // namespace fpi::cuda
