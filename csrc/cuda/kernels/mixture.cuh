// An Anderson step's window, and the iterates that are made of it.
#pragma once

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

// An active row's retreat, or the end of one that has no iteration left; see retreat_beta. value
// and residual are those of the iterate to which it goes back.
template <typename T>
FPI_DEVICE void go_back(const Batch<T>& batch, const Team& team, const Row<T>& row, const T* value,
                        const T* residual, Move move) {
  using Acc = accumulate_t<T>;
  if (move.status != kActive) {
    batch.damp_or_end(team, row, row.x, value, move.status, batch.beta);
    return;
  }
  const Acc beta = retreat_beta(move.differences, halved(batch.beta, move.halvings));
  for_packs<T>(team, row.begin, row.end, batch.aligned, [&](int64_t i, auto access) {
    auto pack = access.load(value + i);
    const auto rs = access.load(residual + i);
#pragma unroll
    for (int l = 0; l < access.kValues; ++l) {
      pack.values[l] = static_cast<T>(
          plain_iterate(static_cast<Acc>(pack.values[l]), static_cast<Acc>(rs.values[l]), beta));
    }
    access.store(row.x + i, pack);
  });
}

// The second launch of plan c: moves the rows. Rows that the first launch had last come first,
// which may still be in the cache.
template <typename T>
struct AndersonMove {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = 5;
  using Acc = accumulate_t<T>;

  Batch<T> batch;
  Window<T> window;

  FPI_DEVICE void operator()() const {
    const Team team = batch.team();
    const Row<T> row = batch.row_of(team, grid_size() - 1 - block_index());
    const Move move = batch.moves[row.number];
    const Acc beta = halved(batch.beta, move.halvings);
    const Ring<T> ring = ring_of(window, row, batch.n, newest_slot(batch.counters(row), window.m));
    if (move.differences > 0) {
      mix(team, row, ring, row.gx, ring.value(1), move.differences,
          batch.gamma + row.number * (window.m - 1), beta, batch.aligned);
    } else if (move.differences < 0) {
      go_back(batch, team, row, ring.value(0), ring.residual(0), move);
    } else if (move.status != kFrozen) {
      batch.damp_or_end(team, row, row.x, row.gx, move.status, beta);
    }
  }
};

}  // namespace fpi::cuda
