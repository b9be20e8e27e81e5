// out = x Wᵀ + u by the products of a solve, in the same order: the same bits.
#pragma once

#include "product.cuh"

namespace fpi::cuda {

template <typename T, bool kMatrix>
struct DenseMap {
  static constexpr int kThreads = kDenseThreads;
  static constexpr int kBlocks = sizeof(T) < 8 ? 2 : 1;
  using Acc = accumulate_t<T>;

  const T* x;
  T* out;
  int64_t rows;
  DenseLayer<T> layer;
  DenseMapPlan plan;

  FPI_DEVICE void operator()() const {
    const int stride = static_cast<int>(stride_of(layer.in, static_cast<int>(sizeof(T))));
    T* const operand = reinterpret_cast<T*>(shared_memory() + plan.operand);
    T* const shared = reinterpret_cast<T*>(shared_memory() + plan.weight);
    T* const panels = reinterpret_cast<T*>(shared_memory() + plan.panels);
    share_rows(layer, plan.shared_rows, shared);
    async_wait<0>();
    const Weight<T> weight = {.source = layer.weight,
                              .shared = shared,
                              .padded = static_cast<int>(layer.out_stride),
                              .stride = stride,
                              .rows = static_cast<int>(layer.out),
                              .shared_rows = static_cast<int>(plan.shared_rows)};
    const int in = static_cast<int>(layer.in);
    for (int64_t first = block_index() * plan.slots; first < rows;
         first += grid_size() * plan.slots) {
      const int count = static_cast<int>(first + plan.slots < rows ? plan.slots : rows - first);
      for (int i = thread_index(); i < count * stride; i += kThreads) {
        const int row = i / stride, k = i % stride;
        operand[i] = k < in ? x[(first + row) * in + k] : T(0.0f);
      }
      block_barrier();
      product<kMatrix>(Rows<T>{operand, stride, count}, weight, panels,
                       [&](int i, int j, Acc value) {
                         const T* u = layer.u.of(first + i);
                         if (u != nullptr) {
                           value += static_cast<Acc>(u[j]);
                         }
                         out[(first + i) * layer.out + j] = static_cast<T>(value);
                       });
      block_barrier();
    }
  }
};

}  // namespace fpi::cuda
