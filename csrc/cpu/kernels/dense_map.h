#pragma once

#include <cstdint>

#include "../../math/accumulate.h"
#include "../../math/dense.h"
#include "../capability.h"

namespace fpi {

constexpr int kMapRows = 24;  // that dense_map takes at a time

}  // namespace fpi

// Panels of a layer's packed weights, and the values of one.
FPI_CPU_KERNEL(template <typename T> int64_t dense_panels(const DenseLayer<T>& layer));
FPI_CPU_KERNEL(template <typename T> int64_t dense_panel_values(const DenseLayer<T>& layer));

// Packs panels [begin, end) of a layer's weights; zeros stand for outputs beyond the last.
FPI_CPU_KERNEL(template <typename T> void dense_pack(const DenseLayer<T>& layer,
                                                     accumulate_t<T>* packed, int64_t begin,
                                                     int64_t end));

// Rows [begin, end) of out [B, layer.out]: the layer at x [B, layer.in]. buffer: one for the call,
// of kMapRows rows of layer.in.
FPI_CPU_KERNEL(template <typename T>
               void dense_map(const DenseLayer<T>& layer, const accumulate_t<T>* packed, const T* x,
                              T* out, accumulate_t<T>* buffer, int64_t begin, int64_t end));
