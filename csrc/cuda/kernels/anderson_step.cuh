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
// An iteration without a mixture:
//   one launch   reads x, g(x), the value and the residual before (4), writes the value, the
//                residual and x (3): 7. Its row of the Gram matrix is left to the next mixture,
//                which takes two rows a pass over residuals that it has just read. Where the
//                residual turns out not to fall, there is a mixture after all, and its pass reads
//                the four again, from the cache.
//   two launches read the m+2 and write the two as ever, so that no row of the matrix is ever
//                missing where parts have gone; then read g(x) and write x (2): m+6.
// The mixture at β ≠ 1 reads the m residuals too. A pass takes 4·kGroups differences; for each
// further pass three residuals are read again: m > 17. A row that ends writes out too and stops at
// that; one that has ended costs nothing. One that is taken back reads a value and a residual.
#pragma once

#include <type_traits>

#include "mixture.cuh"
#include "products.cuh"

namespace fpi::cuda {

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
  using Products = fpi::cuda::Products<T, kGroups>;
  using Sums = typename Products::Sums;

  Batch<T> batch;
  Window<T> window;
  Mixing<Acc> mixing;

  FPI_DEVICE void operator()() const {
    batch.each_row([&](const Team& team, const Row<T>& row) { return advance(team, row); });
  }

  FPI_DEVICE Outcome advance(const Team& team, const Row<T>& row) const {
    const bool one_launch = batch.plan.parts == 1;
    const int m = window.m;
    const int32_t* counters = batch.counters(row);
    // Iterates in the window, before this one; no more than it has room for, whatever is written.
    const int seen = counters[kWindow] < 0 ? 0 : counters[kWindow] < m ? counters[kWindow] : m;
    const Ring<T> ring = ring_of(window, row, batch.n, (newest_slot(counters, m) + 1) % m);
    const int count = seen < m ? seen : m - 1;  // differences, if the window is not restarted
    const int plain = counters[kPlain];
    const Acc last = batch.scalars(row)[kResidual];

    // Whether there may be a mixture: then all products of differences are taken.
    bool mixes = !one_launch || is_due(plain, mixing);
    if (!mixes) {
      push<false>(team, row, ring, seen, count, 0);
      const Acc squares = batch.shared_sums(team)[kResidualSquares];
      mixes = count > 0 && !(is_trusted(squares) && goes_on(square_root(squares), last));
    }
    if (mixes) {
      // Of the Gram matrix, rows but that of this iterate.
      const int missing = !one_launch || plain < 0 ? 0 : plain < count ? plain : count - 1;
      gather(team, row, ring, count, missing);
      push<true>(team, row, ring, seen, count, missing);
    }
    if (!one_launch && !batch.all_arrived(team, row, anderson_sums(count + 1))) {
      return {};
    }
    const auto norms = batch.norms(team, row);
    const Acc scale = scale_of_sums(team, row, ring, seen, count, mixes);
    if (team.rank == 0) {
      batch.counters(row)[kWindow] = seen;
      batch.announce(team, row, decision(team, row, ring, norms, scale, mixes));
    }
    team.barrier();
    const Move move = *batch.shared_move(team);
    const Acc beta = halved(batch.beta, move.halvings);
    Acc* gamma = batch.template team_shared<Acc>(team, batch.shared.gamma);
    if (!one_launch) {
      for (int j = team.rank; j < move.differences; j += team.size) {
        batch.gamma[row.number * (m - 1) + j] = gamma[j];
      }
    } else if (move.differences > 0) {
      mix(team, row, ring, batch.shared_vector(team, 0), batch.shared_vector(team, 1),
          move.differences, gamma, beta, batch.aligned);
    } else if (move.differences < 0) {
      go_back(batch, team, row, ring.value(1 % m), ring.residual(1 % m), move);
    } else {
      batch.damp_or_end(team, row, row.x, batch.shared_vector(team, 0), move.status, beta);
    }
    return {1, move.status == kActive, move.status > kConverged};
  }

  FPI_DEVICE Acc* gram_of(const Row<T>& row) const {
    return window.gram + window.place(row.number, row.sample) * window.m * window.m;
  }

  // The older rows of the Gram matrix, to shared memory: its row of this iterate is yet to come,
  // and so many after it.
  FPI_DEVICE void gather(const Team& team, const Row<T>& row, const Ring<T>& ring, int count,
                         int missing) const {
    const Acc* gram = gram_of(row);
    Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
    for (int e = team.rank; e < count * count; e += team.size) {
      const int i = e / count, j = e % count;
      if (missing < j && j <= i) {
        system[e] = gram[ring.slot(i) * window.m + ring.slot(j)];
      }
    }
  }

  // Stores g(x) and its residual, and takes the sums that need them: squares, and kProducts those
  // of differences with the rows of the Gram matrix that are missing.
  template <bool kProducts>
  FPI_DEVICE void push(const Team& team, const Row<T>& row, const Ring<T>& ring, int seen,
                       int count, int missing) const {
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
      Pack<T, kValues> older[kProducts ? kGroup : 1], rs;
      Products::load_group(older, 0, residual_of, i, access);
      typename Products::template Differences<kValues> d;
#pragma unroll
      for (int l = 0; l < kValues; ++l) {
        const Acc g = static_cast<Acc>(gs.values[l]);
        const Acc r = g - static_cast<Acc>(xs.values[l]);
        sums.squares[kResidualSquares] += r * r;
        sums.squares[kValueSquares] += g * g;
        add_secants(sums.squares + kValueSecant, g, r, static_cast<Acc>(before.values[l]),
                    static_cast<Acc>(older[0].values[l]));
        rs.values[l] = static_cast<T>(r);
        d.newest.values[l] = d.younger.values[l] = static_cast<Acc>(rs.values[l]);
        d.first.values[l] = d.newest.values[l] - static_cast<Acc>(older[0].values[l]);
      }
      if constexpr (kProducts) {
        Products::dot_group(sums.dots[0], older, d);
        Products::more_groups(sums, 0, count, residual_of, i, access, d);
      }
      access.store(new_value + i, gs);
      access.store(new_residual + i, rs);
      if (one_launch) {
        access.store(shared_new + i, gs);
        access.store(shared_previous + i, before);
      }
    });
    Acc* all = batch.shared_sums(team);
    team.reduce(sums.squares, batch.stage(team), all, Add{});
    if constexpr (kProducts) {
      reduce_dots(team, row, ring, sums, 0, 0, count, missing);
      more_passes(team, row, ring, residual_of, count, missing);
    }
  }

  // A pass for further differences, or for two of the missing rows: d_{age+1} in place of r_0.
  template <typename ResidualOf>
  FPI_DEVICE void more_passes(const Team& team, const Row<T>& row, const Ring<T>& ring,
                              const ResidualOf& residual_of, int count, int missing) const {
    for (int age = 0; age <= missing; age += age == 0 ? 1 : 2) {
      for (int first = age == 0 ? kGroups * kGroup : age; first < count;
           first += kGroups * kGroup) {
        Sums sums = {};
        for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
          constexpr int kValues = access.kValues;
          const auto residual = [&](int age) {
            return widened<Acc>(access.load(residual_of(age) + i));
          };
          typename Products::template Differences<kValues> d;
          d.first = residual(age);
          const auto second = residual(age + 1), third = residual(age == 0 ? 1 : age + 2);
#pragma unroll
          for (int l = 0; l < kValues; ++l) {
            d.newest.values[l] = age == 0 ? d.first.values[l] : second.values[l] - third.values[l];
            d.first.values[l] -= second.values[l];
          }
          d.younger = residual(first);
          Pack<T, kValues> older[kGroup];
          Products::load_group(older, first, residual_of, i, access);
          Products::dot_group(sums.dots[0], older, d);
          Products::more_groups(sums, first, count, residual_of, i, access, d);
        });
        reduce_dots(team, row, ring, sums, age, first, count, missing);
      }
    }
  }

  // To the row's sums; those of older rows of the Gram matrix to where the matrix is.
  FPI_DEVICE void reduce_dots(const Team& team, const Row<T>& row, const Ring<T>& ring,
                              const Sums& sums, int age, int first, int count, int missing) const {
    Acc* all = batch.shared_sums(team) + kAndersonNorms;
    Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int begin = first + group * kGroup;
      if (begin < count) {
        const auto put = [&](int i, Acc dot) {
          const int left = age + i / kGroup, j = begin + i % kGroup;
          if (age == 0) {
            all[2 * begin + i] = dot;
          } else if (left <= missing && left <= j && j < count) {
            system[j * count + left] = dot;
            keep(row, ring, left, j, dot);
          }
        };
        team.reduce(sums.dots[group], batch.stage(team), put, Add{});
      }
    }
  }

  // An entry of the Gram matrix, by slot, so that nothing else moves.
  FPI_DEVICE void keep(const Row<T>& row, const Ring<T>& ring, int i, int j, Acc dot) const {
    Acc* gram = gram_of(row);
    const int one = ring.slot(i), other = ring.slot(j);
    gram[one * window.m + other] = gram[other * window.m + one] = dot;
  }

  // Squares of secants from the value and residual before: those of Δg, Δx and Δr.
  FPI_DEVICE static void add_secants(Acc* squares, Acc g, Acc r, Acc older_g, Acc older_r) {
    static_assert(kStateSecant == kValueSecant + 1 && kResidualSecant == kValueSecant + 2);
    const Acc dg = g - older_g, dr = r - older_r, dx = dg - dr;
    squares[0] += dg * dg;
    squares[1] += dx * dx;
    squares[2] += dr * dr;
  }

  // The power of two by which the sums of differences, and the system, are scaled: 1 where they can
  // be trusted. Where not, they are taken anew; see are_trusted. Without a mixture there is no
  // system.
  FPI_DEVICE Acc scale_of_sums(const Team& team, const Row<T>& row, const Ring<T>& ring, int seen,
                               int count, bool mixes) const {
    Acc* sums = batch.shared_sums(team);
    const Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
    Acc trace = count > 0 && mixes ? place_of_dot(sums, 0, false) : Acc(1);
    for (int j = 1; j < count && mixes; ++j) {
      trace += system[j * count + j];
    }
    const bool trusted = are_trusted(sums, seen) && is_trusted(trace);
    if (trusted || count == 0) {
      if constexpr (kGroups > 1) {
        team.barrier();  // the system is solved where it is
      }
      return 1;
    }
    const auto residual_of = [&](int age, int64_t i) {
      return static_cast<Acc>(ring.residual(age)[i]);
    };
    Acc most = 0;
#pragma unroll 1
    for (int age = 0; age <= count; ++age) {
      most = Larger{}(most, batch.largest(team, [&](int64_t i) {
        return residual_of(age, i) - (age == 0 ? Acc(0) : residual_of(age - 1, i));
      }));
    }
    if (!is_finite(most) || most == Acc(0)) {
      return 1;
    }
    const Acc scale = scale_for(most);
    batch.template whole_sums<3>(team, row, sums + kValueSecant, [&](Acc(&squares)[3], int64_t i) {
      const Acc g = static_cast<Acc>(row.gx[i]), r = g - static_cast<Acc>(row.x[i]);
      add_secants(squares, scale * g, scale * r, scale * static_cast<Acc>(ring.value(1)[i]),
                  scale * residual_of(1, i));
    });
    if (mixes) {
      take_system(team, row, ring, count, scale);
    }
    return scale;
  }

  // The products of the residual, and of every difference, with the differences, scaled.
  FPI_DEVICE void take_system(const Team& team, const Row<T>& row, const Ring<T>& ring, int count,
                              Acc scale) const {
    constexpr int kPair = 2;  // differences at a time, the second maybe empty: registers are scarce
    Acc* sums = batch.shared_sums(team);
    Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
    Acc* dots = batch.behind_stage(team, kPair);
    const auto scaled = [&](int age, int64_t i) {
      return scale * static_cast<Acc>(ring.residual(age)[i]);
    };
#pragma unroll 1
    for (int column = -1; column < count; ++column) {  // −1: the right-hand side
#pragma unroll 1
      for (int first = column < 0 ? 0 : column; first < count; first += kPair) {
        const int last = first + kPair < count ? first + kPair : count;
        batch.template whole_sums<kPair>(team, row, dots, [&](Acc(&dot)[kPair], int64_t i) {
          const Acc left = column < 0 ? scaled(0, i) : scaled(column, i) - scaled(column + 1, i);
          const Acc middle = scaled(first + 1, i);
          dot[0] += left * (scaled(first, i) - middle);
          dot[1] += left * (middle - scaled(last, i));
        });
        const int j = first + team.rank;
        if (j < last) {
          (column > 0 ? system[j * count + column] : place_of_dot(sums, j, column < 0)) =
              dots[team.rank];
        }
        team.barrier();
      }
    }
  }

  // Of a row's sums, where d_0 · d_j is, or r_0 · d_j.
  FPI_DEVICE static Acc& place_of_dot(Acc* sums, int j, bool is_right_side) {
    return sums[kAndersonNorms + j / kGroup * 2 * kGroup + is_right_side * kGroup + j % kGroup];
  }

  // The record after this step, the new row of the Gram matrix, and the weights, by one thread.
  // scale: of the sums of differences; the matrix is kept without. has_products: whether they are
  // there.
  FPI_DEVICE Move decision(const Team& team, const Row<T>& row, const Ring<T>& ring,
                           const typename Batch<T>::Norms& norms, Acc scale,
                           bool has_products) const {
    Acc* sums = batch.shared_sums(team);
    int32_t* counters = batch.counters(row);
    const auto [status, used, mixes] = decide<T>(norms.residual, norms.value, sums, scale, mixing,
                                                 window.m, row.sample, batch.record);
    const int32_t halvings = counters[kHalvings];
    if (used < 0 || status != kActive) {
      return {status, used < 0 ? used : 0, halvings};
    }
    Acc* gamma = batch.template team_shared<Acc>(team, batch.shared.gamma);
    Acc* system = batch.template team_shared<Acc>(team, batch.shared.system);
    for (int j = 0; j < used && has_products; ++j) {
      const Acc dot = place_of_dot(sums, j, false);
      keep(row, ring, 0, j, scale == Acc(1) ? dot : dot / scale / scale);
      system[j * used] = dot;
      gamma[j] = place_of_dot(sums, j, true);
    }
    if (!mixes) {
      extend_window(counters, ring.head, used);
      return {status, 0, halvings};
    }
    const bool is_solved =
        used > 0 && solve(used, system, gamma, noise_squares_of<T>(scale * norms.value));
    return {status, update_window(counters, ring.head, used, is_solved), halvings};
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
      const bool solved = ridge_solve(GroupSize{}, a, b, trace, mixing.ridge, noise);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < count) {
          gamma[i] = b[i];
        }
      }
      return solved;
    } else {
      return ridge_solve(count, system, gamma, trace, mixing.ridge, noise);
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
