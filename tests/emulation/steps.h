// The step operators of csrc/cuda: their own layouts and bodies, on emulated blocks.
#pragma once

#include <cstring>

#include "../../csrc/cuda/kernels/anderson_step.cuh"
#include "../../csrc/cuda/kernels/bicgstab_step.cuh"
#include "../../csrc/cuda/kernels/picard_step.cuh"
#include "../../csrc/cuda/layout.h"
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

  unsigned char* bytes() const { return bytes_.get(); }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
  Tracked zeroed_, rest_;
};

template <typename T>
class Run {
 public:
  using Acc = accumulate_t<T>;

  Run(const Request& r, int sums, int m)
      : layout_(r.integer("rows"), r.integer("n"), sums, m), memory_(layout_.scratch) {
    batch = layout_.batch(r.array<T>("x"), r.array<T>("gx"), r.array<T>("out"),
                          static_cast<Acc>(r.number("beta")), emulation::record_of<Acc>(r),
                          r.array<int32_t>("tally"), memory_.bytes(),
                          {r.array<T>("values"), r.array<T>("residuals"), r.array<T>("trail"),
                           r.array<T>("base"), r.array<T>("vectors")});
  }

  template <typename First, typename Second>
  void operator()(const First& first, const Second& second) const {
    layout_.run(first, second, [](const auto& body, int64_t blocks, size_t shared) {
      launch(body, blocks, shared);
    });
  }

  Batch<T> batch;

 private:
  Layout<T> layout_;
  Memory memory_;
};

template <typename T>
void picard_step(const Request& r) {
  const Run<T> run(r, kPicardSums, 1);
  const Trail<T> trail{r.array<T>("trail")};
  run(PicardStep<T>{run.batch, trail}, PicardMove<T>{run.batch, trail});
}

template <typename T>
void anderson_step(const Request& r) {
  using Acc = accumulate_t<T>;
  const int m = static_cast<int>(r.integer("m"));
  const Run<T> run(r, anderson_sums(m), m);
  const Window<T> window{r.array<T>("values"), r.array<T>("residuals"), r.array<Acc>("gram"), m};
  with_groups(m, [&](auto groups) {
    run(AndersonStep<T, groups.value>{run.batch, window, emulation::mixing_of<Acc>(r)},
        AndersonMove<T>{run.batch, window});
  });
}

template <typename T>
void bicgstab_step(const Request& r) {
  using Acc = accumulate_t<T>;
  const Run<T> run(r, kKrylovSums, kKrylovHistory);
  const Krylov<T> krylov{r.array<T>("base"), r.array<Acc>("vectors"), r.array<Acc>("numbers")};
  run(BicgstabStep<T>{run.batch, krylov}, BicgstabMove<T>{run.batch, krylov});
}

// `StepOperators<T> name("dtype");` registers them.
template <typename T>
struct StepOperators {
  explicit StepOperators(const std::string& dtype)
      : picard("picard_step." + dtype, picard_step<T>),
        anderson("anderson_step." + dtype, anderson_step<T>),
        bicgstab("bicgstab_step." + dtype, bicgstab_step<T>) {}

  Operator picard, anderson, bicgstab;
};

}  // namespace fpi::cuda
