// A solve of dense layers laid over blocks and memory. Free of torch, so that the tests' emulation
// launches what the operators launch.
//
// A Machine has
//   multiprocessors(), shared_limit()      the latter in bytes, of a block
//   blocks<Body>(shared bytes)             how many the device holds at a time
//   memory(bytes, zeroed)                  on the device; the first `zeroed` bytes are zero
//   start(body, blocks, shared bytes)      launches
#pragma once

#include <cstdint>

#include "kernels/anderson_step.cuh"
#include "kernels/dense_map.cuh"
#include "kernels/dense_solve.cuh"
#include "kernels/picard_step.cuh"

namespace fpi::cuda {

// hidden: values of that layer; −1: there is none. history: 1 is Picard. bounds: columns.
template <typename T>
DenseShape dense_shape(int64_t n, int64_t hidden, int history, int bounds) {
  return {.n = n,
          .hidden = hidden,
          .value_bytes = static_cast<int>(sizeof(T)),
          .acc_bytes = static_cast<int>(sizeof(accumulate_t<T>)),
          .history = history,
          .sums = history > 1 ? anderson_sums(history) : kPicardSums,
          .bounds = bounds};
}

template <typename T>
DenseShape dense_shape(const DenseCall<T>& call) {
  return dense_shape<T>(call.dense.n, call.dense.has_hidden ? call.dense.hidden.out : -1,
                        call.history, call.record.bound_columns);
}

// Calls run with whether products of T are done on tensor cores, as a constant.
template <typename T, typename Run>
void with_product(bool tf32, const Run& run) {
  if constexpr (sizeof(T) == 2) {
    run(std::true_type{});
  } else if constexpr (std::is_same_v<T, float>) {
    if (tf32) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
  } else {
    run(std::false_type{});
  }
}

// The layer with rows that are padded to whole chunks, copied to `memory` where W's are not.
template <typename T, typename Machine>
DenseLayer<T> padded_layer(DenseLayer<T> layer, bool copies, unsigned char* memory,
                           const Machine& machine) {
  const int64_t padded = padded_of(layer.in, sizeof(T));
  if (copies) {
    T* to = reinterpret_cast<T*>(memory);
    const PadRows<T> pad{layer.weight, to, layer.out, layer.in, padded};
    if (layer.out * padded > 0) {
      machine.start(pad, pad.blocks(), 0);
    }
    layer.weight = to;
  }
  layer.out_stride = padded;
  return layer;
}

template <typename T>
bool needs_copy(const DenseLayer<T>& layer) {
  return !is_padded(layer.in, sizeof(T), is_aligned(layer.weight));
}

// Returns whether the shape fits; if not, nothing was done.
template <typename T, typename Machine>
bool dense_solve(const DenseCall<T>& call, const Machine& machine) {
  const DenseShape shape = dense_shape(call);
  const bool is_matrix = sizeof(T) == 2 || (sizeof(T) == 4 && call.tf32);
  const DensePlan plan = dense_plan(shape, call.samples, call.slots, machine.multiprocessors(),
                                    machine.shared_limit(), is_matrix && call.history == 1);
  if (plan.slots == 0) {
    return false;
  }
  with_product<T>(call.tf32, [&](auto matrix) {
    using Acc = accumulate_t<T>;
    const auto solve = [&](auto solver_of) {
      using Solver = decltype(solver_of(Batch<T>{}, Window<T>{}));
      using Body = DenseSolve<T, decltype(matrix)::value, Solver>;
      const bool copies_hidden = call.dense.has_hidden && needs_copy(call.dense.hidden);
      const bool copies_output = needs_copy(call.dense.output);
      const int64_t tiles = divide_up(call.samples, plan.slots);
      const int64_t fit = machine.template blocks<Body>(plan.bytes);
      const int64_t blocks = tiles < 1 ? 1 : tiles < fit ? tiles : fit;
      const DenseWork work = dense_work(plan, shape, blocks, copies_hidden, copies_output);
      unsigned char* const memory = machine.memory(work.bytes, work.zeroed);

      DenseStep<T> dense = call.dense;
      if (dense.has_hidden) {
        dense.hidden =
            padded_layer(dense.hidden, copies_hidden, memory + work.weight_hidden, machine);
      }
      dense.output =
          padded_layer(dense.output, copies_output, memory + work.weight_output, machine);
      Batch<T> batch = {};
      batch.n = plan.rows.span;
      batch.beta = static_cast<Acc>(call.beta);
      batch.record.limits = call.record.limits;
      batch.record.bound_columns = call.record.bound_columns;
      batch.aligned = true;
      batch.plan = plan.rows;
      batch.shared = plan.shared;
      batch.sums = shape.sums;
      const Window<T> window = {reinterpret_cast<T*>(memory + work.values),
                                reinterpret_cast<T*>(memory + work.residuals),
                                reinterpret_cast<Acc*>(memory + work.gram), call.history, true};
      machine.start(Body{.solver = solver_of(batch, window),
                         .dense = dense,
                         .plan = plan,
                         .samples = call.samples,
                         .x0 = call.x0,
                         .out = call.out,
                         .record = call.record,
                         .tally = call.tally,
                         .counts = reinterpret_cast<DenseCounts*>(memory),
                         .x = reinterpret_cast<T*>(memory + work.x),
                         .gx = reinterpret_cast<T*>(memory + work.gx)},
                    blocks, static_cast<size_t>(plan.bytes));
    };
    if (call.history == 1) {
      solve([](const Batch<T>& batch, const Window<T>& window) {
        return PicardStep<T>{batch, {window.values, true}};
      });
    } else {
      with_groups(call.history, [&](auto groups) {
        solve([&](const Batch<T>& batch, const Window<T>& window) {
          return AndersonStep<T, decltype(groups)::value>{batch, window, call.mixing};
        });
      });
    }
  });
  return true;
}

template <typename T, typename Machine>
bool dense_map(const T* x, T* out, int64_t rows, const DenseLayer<T>& layer, bool tf32,
               const Machine& machine) {
  const DenseMapPlan plan = dense_map_plan(layer.in, layer.out, sizeof(T), rows,
                                           machine.multiprocessors(), machine.shared_limit());
  if (plan.slots == 0) {
    return false;
  }
  if (rows == 0) {
    return true;
  }
  with_product<T>(tf32, [&](auto matrix) {
    using Body = DenseMap<T, decltype(matrix)::value>;
    const bool copies = needs_copy(layer);
    const int64_t bytes =
        copies ? layer.out * padded_of(layer.in, sizeof(T)) * static_cast<int64_t>(sizeof(T)) : 0;
    unsigned char* const memory = machine.memory(bytes, 0);
    const int64_t tiles = divide_up(rows, plan.slots);
    const int64_t fit = machine.template blocks<Body>(plan.bytes);
    machine.start(Body{x, out, rows, padded_layer(layer, copies, memory, machine), plan},
                  tiles < fit ? tiles : fit, static_cast<size_t>(plan.bytes));
  });
  return true;
}

}  // namespace fpi::cuda
