// A row's values, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "team.cuh"

namespace fpi::cuda {

template <typename T>
constexpr int kWidth = kPackBytes / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(kPackBytes) Pack {
  T values[kWidth<T>];
};

// A pack in one access; the address is a multiple of 16.
template <typename T>
struct Whole {
  FPI_DEVICE Pack<T> load(const T* p) const { return *reinterpret_cast<const Pack<T>*>(p); }
  FPI_DEVICE void store(T* p, const Pack<T>& pack) const { *reinterpret_cast<Pack<T>*>(p) = pack; }
};

// The first count values of a pack, zeros behind them; any address.
template <typename T>
struct ByValue {
  int count;

  FPI_DEVICE Pack<T> load(const T* p) const {
    Pack<T> pack;
#pragma unroll
    for (int l = 0; l < kWidth<T>; ++l) {
      pack.values[l] = l < count ? p[l] : static_cast<T>(0.0f);
    }
    return pack;
  }

  FPI_DEVICE void store(T* p, const Pack<T>& pack) const {
#pragma unroll
    for (int l = 0; l < kWidth<T>; ++l) {
      if (l < count) {
        p[l] = pack.values[l];
      }
    }
  }
};

// Runs body(i, access) for every pack of [begin, end); access loads and stores the pack at i. A
// thread's packs are the same whether aligned or not, and so is the order of its sums.
template <typename T, typename Body>
FPI_DEVICE void for_packs(const Team& team, int64_t begin, int64_t end, bool aligned,
                          const Body& body) {
  const int64_t stride = static_cast<int64_t>(team.size) * kWidth<T>;
  for (int64_t i = begin + static_cast<int64_t>(team.rank) * kWidth<T>; i < end; i += stride) {
    if (aligned) {  // then rows end with a whole pack
      body(i, Whole<T>{});
    } else {
      body(i, ByValue<T>{end - i < kWidth<T> ? static_cast<int>(end - i) : kWidth<T>});
    }
  }
}

}  // namespace fpi::cuda
