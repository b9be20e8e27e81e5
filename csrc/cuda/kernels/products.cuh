// The products of differences of residuals that one pass over a row takes.
#pragma once

#include "../../math/anderson.h"
#include "pack.cuh"

namespace fpi::cuda {

static_assert(anderson_sums(1) == kAndersonNorms);

// kGroups: groups of four differences that one pass takes.
template <typename T, int kGroups>
struct Products {
  using Acc = accumulate_t<T>;

  // Of a pass; of every group d_0 · d_j, then r_0 · d_j.
  struct Sums {
    Acc squares[kAndersonNorms];
    Acc dots[kGroups][2 * kGroup];
  };

  // Of the values that a thread has at hand: r_0, d_0, and the last residual read.
  template <int kValues>
  struct Differences {
    Pack<Acc, kValues> newest, first, younger;
  };

  // The residuals of ages first + 1 to first + kCount; beyond the last, the last again.
  template <typename ResidualOf, typename Access, int kValues, int kCount>
  FPI_DEVICE static void load_group(Pack<T, kValues> (&older)[kCount], int first,
                                    const ResidualOf& residual_of, int64_t i, Access access) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
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
};

}  // namespace fpi::cuda
