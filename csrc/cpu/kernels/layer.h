// One layer of a dense step, on the rows of a tile.
#pragma once

#include "../../math/dense.h"
#include "product.h"

namespace fpi::FPI_CPU_NAMESPACE {

// s ∘ x in the accumulate type: x itself where it is that already, else in `buffer`.
template <typename T>
FPI_HOST_DEVICE const accumulate_t<T>* operand(const T* x, const T* scale, int64_t n,
                                               accumulate_t<T>* buffer) {
  using Acc = accumulate_t<T>;
  if constexpr (std::is_same_v<T, Acc>) {
    if (scale == nullptr) {
      return x;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const Acc value = static_cast<Acc>(x[i]);
    buffer[i] = scale == nullptr ? value : value * static_cast<Acc>(scale[i]);
  }
  return buffer;
}

// What a layer reads and writes of each row of a tile. in and kept are in the accumulate type.
template <typename T, typename Out>
struct LayerRows {
  int count;
  const accumulate_t<T>* const* in;    // what it multiplies
  const accumulate_t<T>* const* kept;  // t, of which α t is added; null where α = 0
  Out* const* out;
  const int64_t* sample;
};

// What follows the sums of one row for `vectors` vectors of outputs from `first` on.
template <Activation kActivation, typename T, typename Out>
__attribute__((noinline)) void finish(const DenseLayer<T>& layer, accumulate_t<T> residual,
                                      const LayerRows<T, Out>& rows, int r, int64_t first,
                                      const Vector<accumulate_t<T>>* sums, int vectors) {
  using Acc = accumulate_t<T>;
  const T* u = layer.u.of(rows.sample[r]);
  const T* scale = layer.scale.of(rows.sample[r]);
  const Acc* kept = rows.kept == nullptr ? nullptr : rows.kept[r];
  Out* out = rows.out[r];
  const int64_t left = layer.out - first, whole = vectors * kLanes<Acc>;
  for_vectors<T>(left < whole ? left : whole,
                 [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                   const int64_t o = first + i;
                   Vector<Acc> value = sums[i / kLanes<Acc>];
                   if (u != nullptr && scale == nullptr) {
                     value += load(u + o);
                   }
                   if (kept != nullptr) {
                     value += residual * load(kept + o);
                   }
                   if (scale == nullptr) {
                     value = activate<kActivation>(value);
                   } else {
                     value *= load(scale + o);
                     value = u == nullptr ? value : value + load(u + o);
                   }
                   store(out + o, value);
                 });
}

// The layer at the rows: α t is added to what it multiplies and u, before the activation.
template <typename T, typename Out>
void apply(const DenseLayer<T>& layer, const accumulate_t<T>* packed, double residual,
           const LayerRows<T, Out>& rows) {
  using Acc = accumulate_t<T>;
  constexpr decltype(&finish<kIdentity, T, Out>) kFinish[kActivations] = {
      finish<kIdentity, T, Out>, finish<kTanh, T, Out>,     finish<kRelu, T, Out>,
      finish<kSigmoid, T, Out>,  finish<kSoftplus, T, Out>, finish<kGelu, T, Out>};
  const auto then = kFinish[layer.activation];
  product(rows.in, rows.count, packed, layer.in, layer.out,
          [&](int r, int64_t first, const Vector<Acc>* sums, int vectors) {
            then(layer, static_cast<Acc>(residual), rows, r, first, sums, vectors);
          });
}

}  // namespace fpi::FPI_CPU_NAMESPACE
