// A row's values, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "../../math/accumulate.h"
#include "../../math/update.h"
#include "team.cuh"

namespace fpi::cuda {

inline bool is_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % kPackBytes == 0;
}

template <typename T>
constexpr int kWidth = kPackBytes / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T values[kCount];
};

template <typename Acc, typename T, int kCount>
FPI_DEVICE Pack<Acc, kCount> widened(const Pack<T, kCount>& pack) {
  Pack<Acc, kCount> wide;
#pragma unroll
  for (int l = 0; l < kCount; ++l) {
    wide.values[l] = static_cast<Acc>(pack.values[l]);
  }
  return wide;
}

// x + β (g − x)
template <typename T, int kCount>
FPI_DEVICE Pack<T, kCount> damped(Pack<T, kCount> x, const Pack<T, kCount>& gx,
                                  accumulate_t<T> beta) {
#pragma unroll
  for (int l = 0; l < kCount; ++l) {
    x.values[l] = damped_update(x.values[l], gx.values[l], beta);
  }
  return x;
}

// kCount values in one access, at a multiple of their bytes.
template <typename T, int kCount>
struct Access {
  static constexpr int kValues = kCount;
  using Values = Pack<T, kCount>;

  FPI_DEVICE Values load(const T* p) const { return *reinterpret_cast<const Values*>(p); }
  FPI_DEVICE void store(T* p, const Values& values) const {
    if constexpr (sizeof(Values) == kPackBytes) {
      store_16(p, values);
    } else {
      *reinterpret_cast<Values*>(p) = values;
    }
  }
};

// Runs body(i, access) over [begin, end), a pack at a time where aligned, else value by value. A
// thread's values and their order are the same either way, and so are its sums. The first value of
// an unaligned pack brings the others into the cache.
template <typename T, typename Body>
FPI_DEVICE void for_packs(const Team& team, int64_t begin, int64_t end, bool aligned,
                          const Body& body) {
  constexpr int kValues = kWidth<T>;
  const int64_t stride = static_cast<int64_t>(team.size) * kValues;
  for (int64_t i = begin + static_cast<int64_t>(team.rank) * kValues; i < end; i += stride) {
    if (aligned) {  // then rows end with a whole pack
      body(i, Access<T, kValues>{});
    } else {
#pragma unroll 1
      for (int64_t j = i; j < end && j < i + kValues; ++j) {
        body(j, Access<T, 1>{});
      }
    }
  }
}

}  // namespace fpi::cuda
