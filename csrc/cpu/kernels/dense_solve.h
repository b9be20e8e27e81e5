#pragma once

#include <cstdint>

#include "../../math/accumulate.h"
#include "../../math/dense.h"
#include "../../math/progress.h"
#include "../capability.h"

namespace fpi {

constexpr int kMaxSlots = 64;  // samples that a thread iterates at a time

template <typename T>
struct DenseSolve {
  DenseCall<T> call;
  int slots;                             // of a thread, up to kMaxSlots
  const accumulate_t<T>* packed_hidden;  // see dense_pack; null where there is no hidden layer
  const accumulate_t<T>* packed_output;
  bool (*stopped)(void* watch);  // asked now and then: whether to leave off
  void* watch;
};

// What a thread brought about.
struct Ended {
  int64_t failed = 0;      // samples that did not converge
  int32_t iterations = 0;  // the most that one took
};

}  // namespace fpi

// Bytes of memory that dense_solve works in.
FPI_CPU_KERNEL(template <typename T> int64_t dense_solve_bytes(const DenseSolve<T>& solve));

// Iterates samples, each to its end, until none is left to begin with: *next is the number of the
// next one, which threads share. A slot whose sample has ended takes another at once. Where the
// solve is stopped, samples are left as they are.
FPI_CPU_KERNEL(template <typename T>
               Ended dense_solve(const DenseSolve<T>& solve, int64_t* next, unsigned char* memory));
