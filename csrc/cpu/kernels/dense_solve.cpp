#include "dense_solve.h"

#include "anderson_step.h"
#include "dtypes.h"
#include "layer.h"
#include "picard_step.h"

namespace fpi::FPI_CPU_NAMESPACE {
namespace {

// The samples that a thread iterates, one a slot.
template <typename T>
struct Tile {
  using Acc = accumulate_t<T>;

  T *x, *gx;              // [slots, n]
  Acc* operand;           // [slots, n]: t, where x itself can't serve
  Acc* hidden;            // [slots, hidden outputs]
  T *values, *residuals;  // [slots, history, n]; of Picard values alone, the trail
  Acc* gram;              // [slots, history, history]
  int64_t bytes = 0;      // of all this
  unsigned char* memory;

  Tile(const DenseSolve<T>& s, unsigned char* memory) : memory(memory) {
    const bool is_picard = s.call.history == 1;
    const int64_t rows = s.slots, n = s.call.dense.n, m = is_picard ? 0 : s.call.history;
    take(x, rows * n);
    take(gx, rows * n);
    take(operand, rows * n);
    take(hidden, s.call.dense.has_hidden ? rows * s.call.dense.hidden.out : 0);
    take(values, rows * (is_picard ? kTrailLength : m) * n);
    take(residuals, rows * m * n);
    take(gram, rows * m * m);
  }

 private:
  template <typename Value>
  void take(Value*& array, int64_t count) {
    array = reinterpret_cast<Value*>(memory + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(Value)) + 63) / 64 * 64;
  }
};

// What a sample's iteration takes, in products of a matrix's entries; a value of the state, whose
// window is read from memory, takes as long as many.
template <typename T>
int64_t work_of(const DenseSolve<T>& solve) {
  const DenseStep<T>& step = solve.call.dense;
  const DenseLayer<T>&hidden = step.hidden, &output = step.output;
  return output.in * output.out + (step.has_hidden ? hidden.in * hidden.out : 0) +
         step.n * (64 + 32 * solve.call.history);
}

// g at the x of the tile's slots [count].
template <typename T>
void evaluate(const DenseSolve<T>& solve, const Tile<T>& tile, const int* slots,
              const int64_t* samples, int count) {
  using Acc = accumulate_t<T>;
  const DenseStep<T>& step = solve.call.dense;
  const Acc* t[kMaxSlots];
  const Acc* hidden[kMaxSlots];
  Acc* to_hidden[kMaxSlots];
  T* gx[kMaxSlots];
  for (int i = 0; i < count; ++i) {
    const int64_t slot = slots[i];
    t[i] = operand(tile.x + slot * step.n, step.scale.of(samples[i]), step.n,
                   tile.operand + slot * step.n);
    hidden[i] = to_hidden[i] = tile.hidden + slot * step.hidden.out;
    gx[i] = tile.gx + slot * step.n;
  }
  if (step.has_hidden) {
    apply<T, Acc>(step.hidden, solve.packed_hidden, 0.0, {count, t, nullptr, to_hidden, samples});
  }
  apply<T, T>(step.output, solve.packed_output, step.residual,
              {count, step.has_hidden ? hidden : t, step.residual == 0 ? nullptr : t, gx, samples});
}

}  // namespace

template <typename T>
int64_t dense_solve_bytes(const DenseSolve<T>& solve) {
  return Tile<T>(solve, nullptr).bytes;
}

template <typename T>
Ended dense_solve(const DenseSolve<T>& solve, int64_t* next, unsigned char* memory) {
  using Acc = accumulate_t<T>;
  const Tile<T> tile(solve, memory);
  const DenseCall<T>& call = solve.call;
  const int64_t n = call.dense.n;
  int64_t sample_of_slot[kMaxSlots];
  Record<Acc> record = call.record;
  record.index = sample_of_slot;
  const Window<T> window{tile.values, tile.residuals, tile.gram, call.history, true};
  const Trail<T> trail{tile.values, true};
  const auto status_of = [&](int64_t sample) {
    return record.counters[sample * kCounters + kStatus];
  };
  const auto refill = [&](int slot) {
    for (;;) {
      const int64_t sample = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (sample >= call.samples) {
        return false;
      }
      if (status_of(sample) == kActive) {  // else it has its result already
        sample_of_slot[slot] = sample;
        memcpy(tile.x + slot * n, call.x0 + sample * n, n * sizeof(T));
        return true;
      }
    }
  };

  Ended ended;
  int used = 0;  // slots; those after them never had a sample
  while (used < solve.slots && refill(used)) {
    ++used;
  }
  int slots[kMaxSlots];
  int64_t samples[kMaxSlots];
  // Whether to leave off is asked after so much work, under a millisecond. States so long that a
  // tile's iteration would take much more than some 30 ms are worked on in pieces of fewer rows.
  constexpr int64_t kOften = int64_t{1} << 22, kPiece = int64_t{1} << 30;
  const int64_t work = work_of(solve);
  const int piece = work > kPiece ? 1 : static_cast<int>(kPiece / (work > 0 ? work : 1));
  int64_t done = 0;  // since the last question
  const auto stopped_after = [&](int rows) {
    done += rows * work;
    if (done < kOften) {
      return false;
    }
    done = 0;
    return solve.stopped(solve.watch);
  };
  for (;;) {
    int active = 0;
    for (int slot = 0; slot < used; ++slot) {
      if (status_of(sample_of_slot[slot]) == kActive) {
        slots[active] = slot;
        samples[active++] = sample_of_slot[slot];
      }
    }
    if (active == 0) {
      return ended;
    }
    for (int first = 0; first < active; first += piece) {
      const int rows = active - first < piece ? active - first : piece;
      evaluate(solve, tile, slots + first, samples + first, rows);
      if (stopped_after(rows)) {
        return ended;
      }
    }
    Tally tally;
    for (int first = 0; first < used; first += piece) {
      const int end = used - first < piece ? used : first + piece;
      const Tally part = call.history == 1 ? picard_step(tile.x, tile.gx, call.out, n, call.beta,
                                                         trail, record, first, end)
                                           : anderson_step(tile.x, tile.gx, call.out, n, call.beta,
                                                           call.mixing, window, record, first, end);
      tally.active += part.active;
      tally.failed += part.failed;
      if (end < used && stopped_after(end - first)) {
        return ended;
      }
    }
    ended.failed += tally.failed;
    for (int i = 0; i < active && tally.active < active; ++i) {
      if (status_of(samples[i]) != kActive) {
        const int32_t took = record.counters[samples[i] * kCounters + kIterations];
        ended.iterations = took > ended.iterations ? took : ended.iterations;
        refill(slots[i]);
      }
    }
  }
}

#define FPI_INSTANTIATE(T)                                  \
  template int64_t dense_solve_bytes(const DenseSolve<T>&); \
  template Ended dense_solve(const DenseSolve<T>&, int64_t*, unsigned char*);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
