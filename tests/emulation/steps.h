// The step operators of csrc/cuda, with the plans and scratch memory of csrc/cuda/step.h.
#pragma once

#include <cstring>

#include "../../csrc/cuda/kernels/anderson_step.cuh"
#include "../../csrc/cuda/kernels/picard_step.cuh"
#include "serve.h"

namespace fpi::cuda {

using emulation::Operator;
using emulation::Request;
using emulation::Tracked;

// Holds NaN but for its first bytes, which are zero.
class Memory {
 public:
  explicit Memory(const Scratch& scratch)
      : bytes_(new unsigned char[scratch.bytes]),
        zeroed_(bytes_.get(), scratch.zeroed, "counts and arrivals", Tracked::kGiven),
        rest_(bytes_.get() + scratch.zeroed, scratch.bytes - scratch.zeroed, "scratch memory",
              Tracked::kFresh) {
    std::memset(bytes_.get(), 0xff, scratch.bytes);
    std::memset(bytes_.get(), 0, scratch.zeroed);
  }

  template <typename Item>
  Item* at(int64_t offset) const {
    return reinterpret_cast<Item*>(bytes_.get() + offset);
  }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
  Tracked zeroed_, rest_;
};

template <typename T>
Step<T> step_of(const Request& r, const Plan& plan, const Desk& desk, int sums,
                const Scratch& scratch, const Memory& memory) {
  using Acc = accumulate_t<T>;
  const int64_t n = r.integer("n");
  bool aligned = n % kWidth<T> == 0;
  for (const char* name : {"x", "gx", "out", "values", "residuals"}) {
    aligned = aligned && reinterpret_cast<std::uintptr_t>(r.array<T>(name)) % kPackBytes == 0;
  }
  return {r.array<T>("x"),
          r.array<T>("gx"),
          r.array<T>("out"),
          r.integer("rows"),
          n,
          static_cast<Acc>(r.number("beta")),
          {r.array<int32_t>("counters"),
           r.array<Acc>("scalars"),
           r.array<Acc>("floor"),
           r.array<int64_t>("index"),
           {static_cast<Acc>(r.number("rtol")), static_cast<Acc>(r.number("offset")),
            static_cast<Acc>(r.number("rounding")), static_cast<int32_t>(r.integer("patience")),
            static_cast<int32_t>(r.integer("max_iterations"))},
           0},
          r.array<int32_t>("tally"),
          aligned,
          plan,
          desk,
          sums,
          memory.at<int32_t>(0),
          memory.at<int32_t>(scratch.arrivals),
          memory.at<Move>(scratch.moves),
          memory.at<Acc>(scratch.gamma),
          memory.at<Acc>(scratch.partials)};
}

// first(step) and second(step) make the bodies.
template <typename T, typename First, typename Second>
void run(const Request& r, int sums, int m, const First& first, const Second& second) {
  const int64_t rows = r.integer("rows"), n = r.integer("n");
  constexpr int kAccBytes = sizeof(accumulate_t<T>);
  const Plan plan = plan_of(n, sizeof(T));
  const Desk desk = desk_of(plan, n, sizeof(T), kAccBytes, sums, m);
  const Scratch scratch = scratch_of(plan, rows, kAccBytes, sums, m);
  const Memory memory(scratch);
  const Step<T> step = step_of<T>(r, plan, desk, sums, scratch, memory);
  const int64_t blocks = blocks_of(plan, rows);
  launch(first(step), blocks, shared_bytes(plan, desk));
  if (plan.parts > 1 && rows > 0) {
    launch(second(step), blocks, 0);
  }
}

template <typename T>
void picard_step(const Request& r) {
  run<T>(
      r, kPicardSums, 1, [](const Step<T>& step) { return PicardStep<T>{step}; },
      [](const Step<T>& step) { return PicardMove<T>{step}; });
}

template <typename T>
void anderson_step(const Request& r) {
  using Acc = accumulate_t<T>;
  const int m = static_cast<int>(r.integer("m"));
  const Window<T> window{r.array<T>("values"), r.array<T>("residuals"), r.array<Acc>("gram"), m};
  const Acc ridge = static_cast<Acc>(r.number("ridge"));
  const Acc restart = static_cast<Acc>(r.number("restart"));
  const auto with_groups = [&](auto groups) {
    run<T>(
        r, anderson_sums(m), m,
        [&](const Step<T>& step) {
          return AndersonStep<T, groups.value>{step, window, ridge, restart};
        },
        [&](const Step<T>& step) { return AndersonMove<T>{step, window}; });
  };
  if (m - 1 <= kGroup) {
    with_groups(std::integral_constant<int, 1>{});
  } else {
    with_groups(std::integral_constant<int, 4>{});
  }
}

// `StepOperators<T> name("dtype");` registers both.
template <typename T>
struct StepOperators {
  explicit StepOperators(const std::string& dtype)
      : picard("picard_step." + dtype, picard_step<T>),
        anderson("anderson_step." + dtype, anderson_step<T>) {}

  Operator picard, anderson;
};

}  // namespace fpi::cuda
