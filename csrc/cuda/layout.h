// A step laid over blocks and scratch memory. Free of torch, so that the tests' emulation launches
// what the operators launch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/rows.cuh"

namespace fpi::cuda {

template <typename T>
struct Layout {
  using Acc = accumulate_t<T>;

  int64_t rows, n;
  int sums;  // of a row
  Plan plan;
  TeamShared shared;
  Scratch scratch;

  // m: Anderson's history, 1 if none.
  Layout(int64_t rows, int64_t n, int sums, int m)
      : rows(rows),
        n(n),
        sums(sums),
        plan(plan_of(n, sizeof(T))),
        shared(team_shared_of(plan, n, sizeof(T), sizeof(Acc), sums, m)),
        scratch(scratch_of(plan, rows, sizeof(Acc), sums, m)) {}

  // memory: scratch.bytes, the first scratch.zeroed of them zero. vectors: those of n values a row
  // that the step touches beside x, gx and out.
  Batch<T> batch(T* x, const T* gx, T* out, Acc beta, const Record<Acc>& record, int32_t* tally,
                 unsigned char* memory, std::initializer_list<const T*> vectors) const {
    bool aligned = n % kWidth<T> == 0 && is_aligned(x) && is_aligned(gx) && is_aligned(out);
    for (const T* v : vectors) {
      aligned = aligned && is_aligned(v);
    }
    return {.x = x,
            .gx = gx,
            .out = out,
            .rows = rows,
            .n = n,
            .beta = beta,
            .record = record,
            .tally = tally,
            .aligned = aligned,
            .plan = plan,
            .shared = shared,
            .sums = sums,
            .counts = reinterpret_cast<int32_t*>(memory),
            .arrivals = reinterpret_cast<int32_t*>(memory + scratch.arrivals),
            .moves = reinterpret_cast<Move*>(memory + scratch.moves),
            .gamma = reinterpret_cast<Acc*>(memory + scratch.gamma),
            .partials = reinterpret_cast<Acc*>(memory + scratch.partials)};
  }

  // start(body, blocks, shared bytes) launches. The first launch is all there is unless several
  // blocks share a row.
  template <typename First, typename Second, typename Start>
  void run(const First& first, const Second& second, const Start& start) const {
    const int64_t blocks = blocks_of(plan, rows);
    start(first, blocks, shared_bytes(plan, shared));
    if (plan.parts > 1 && rows > 0) {
      start(second, blocks, size_t{0});
    }
  }
};

}  // namespace fpi::cuda
