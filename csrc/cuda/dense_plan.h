// How a solve of dense layers is laid over blocks, shared memory and device memory. Pure C++, so
// that tests run the plans that the operators run.
//
// A block keeps `slots` samples at a time. Nothing that is decided here changes a bit of a result:
// every value is a sum over k in ascending order, whatever tile it lies in, and the order of a
// step's sums follows from N and dtype.
#pragma once

#include <initializer_list>

#include "../math/progress.h"
#include "../math/window.h"
#include "plan.h"

namespace fpi::cuda {

constexpr int kDenseThreads = 256;  // of a block
constexpr int kDenseWarps = kDenseThreads / kWarpThreads;
constexpr int kMostSlots = 64;

// Longer rows are a block's. Two vectors a row are in each team's shared memory.
constexpr int64_t kDenseWarpRowBytes = 2048;

// Tiles are zero from a row's end to the next multiple of this: what an instruction of a tensor
// core takes of k.
constexpr int kChunkBytes = 32;

// Weights that do not stay in shared memory come in panels, two at a time: so many rows of W by 64
// bytes of k, or fewer rows by more of k.
constexpr int kPanelRows = 256;
constexpr int kPanelDepthBytes = 64;
constexpr int64_t kPanelBytes = kPanelRows * (kPanelDepthBytes + kPackBytes);

// Values of a row with its zeros.
FPI_HOST_DEVICE constexpr int64_t padded_of(int64_t k, int value_bytes) {
  const int chunk = kChunkBytes / value_bytes;
  return divide_up(k, chunk) * chunk;
}

// Values from a tile's row to the next: an odd number of packs, so that the packs of eight rows at
// the same k lie in different banks.
FPI_HOST_DEVICE constexpr int64_t stride_of(int64_t k, int value_bytes) {
  return padded_of(k, value_bytes) + kPackBytes / value_bytes;
}

// A warp's part of a product: rows of the operand by rows of W, which are the result's columns.
struct ProductTile {
  int rows, columns;
};

// Tiles as wide as keep all warps busy: a warp reads its columns' k once for all of its rows, and
// its rows' once for all of its columns. is_matrix: on tensor cores.
FPI_HOST_DEVICE constexpr ProductTile tile_of(bool is_matrix, int64_t rows, int64_t columns) {
  const auto fills = [&](ProductTile tile) {
    return divide_up(rows, tile.rows) * divide_up(columns, tile.columns) >= kDenseWarps;
  };
  if (is_matrix) {
    return rows > 16 && fills({32, 32}) ? ProductTile{32, 32} : ProductTile{16, 16};
  }
  return rows > 24 && fills({8, 128}) ? ProductTile{8, 128}
         : rows > 8 && fills({8, 64}) ? ProductTile{8, 64}
         : rows > 2                   ? ProductTile{8, 32}
                                      : ProductTile{2, 32};
}

// Columns that the block's warps take at a time, side by side: in as many rows of tiles as there
// are, and no more of them than a panel holds. A slab is of rows of W that stay or of such that
// stream.
FPI_HOST_DEVICE constexpr int slab_of(ProductTile tile, int64_t rows) {
  const int groups = static_cast<int>(divide_up(rows, tile.rows));
  const int across = kDenseWarps / groups, most = kPanelRows / tile.columns;
  return (across < most ? across : most) * tile.columns;
}

struct DenseShape {
  int64_t n;       // values of a state
  int64_t hidden;  // of the hidden layer; −1: there is none
  int value_bytes, acc_bytes;
  int history;  // 1: Picard
  int sums;     // of a step
  int bounds;   // columns of a sample's bounds
};

struct DensePlan {
  int slots;  // 0: the shape does not fit
  Plan rows;  // of a step; rows_per_block teams work at a time
  TeamShared shared;
  bool is_shared;                        // x and g(x) lie in shared memory
  int64_t shared_hidden, shared_output;  // rows of W₁ and of W that stay in shared memory
  // Shared memory, offsets in bytes; behind a step's, which comes first.
  int64_t block_shared;  // DenseShared
  int64_t active;        // int32 [slots]: the slots that hold a sample, ascending
  int64_t samples;       // int32 [slots]: the sample of a slot, or −1
  int64_t fresh;         // int32 [slots]: whether a slot's sample has yet to be read
  int64_t counters;      // the slots' records
  int64_t scalars;
  int64_t bounds;
  int64_t x, gx;    // [slots][padded n], if is_shared
  int64_t operand;  // t, [slots][stride]
  int64_t hidden;   // h, [slots][stride]
  int64_t weight_hidden, weight_output;
  int64_t panels;
  int64_t bytes;
};

constexpr int64_t kDenseSharedBytes = 16;

// With as many rows of the weights as fit; slots 0 if not even the rest does.
constexpr DensePlan dense_layout(const DenseShape& s, int slots, bool is_shared, int64_t limit) {
  DensePlan p = {};
  const int64_t padded = padded_of(s.n, s.value_bytes);
  const int64_t row_bytes = padded * s.value_bytes;
  if (row_bytes > kBlockRowBytes) {
    return p;
  }
  p.rows = row_bytes <= kDenseWarpRowBytes ? Plan{kWarpThreads, kDenseWarps, 1, padded}
                                           : Plan{kDenseThreads, 1, 1, padded};
  p.shared = team_shared_of(p.rows, padded, s.value_bytes, s.acc_bytes, s.sums, s.history);
  p.is_shared = is_shared;

  int64_t end = static_cast<int64_t>(shared_bytes(p.rows, p.shared));
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, kPackBytes);
    return begin;
  };
  const int64_t has_hidden = s.hidden >= 0, hidden = has_hidden ? s.hidden : 0;
  const int64_t stride = stride_of(s.n, s.value_bytes) * s.value_bytes;
  const int64_t hidden_stride = stride_of(hidden, s.value_bytes) * s.value_bytes;
  p.block_shared = take(kDenseSharedBytes);
  p.active = take(slots * 4);
  p.samples = take(slots * 4);
  p.fresh = take(slots * 4);
  p.counters = take(slots * kCounters * 4);
  p.scalars = take(slots * kScalars * s.acc_bytes);
  p.bounds = take(slots * s.bounds * s.acc_bytes);
  p.x = take(is_shared ? slots * row_bytes : 0);
  p.gx = take(is_shared ? slots * row_bytes : 0);
  p.operand = take(slots * stride);
  p.hidden = take(has_hidden * slots * hidden_stride);

  const int64_t output_stride = has_hidden ? hidden_stride : stride;
  int64_t room = limit - end;
  p.shared_hidden = hidden;
  p.shared_output = s.n;
  if (hidden * stride + s.n * output_stride > room) {  // a unit of a warp is 32 columns wide
    p.panels = take(2 * kPanelBytes);
    room = limit - end;
    if (room < 0) {
      return p;
    }
    const int64_t first = room / stride;
    p.shared_hidden = first < hidden ? first / 32 * 32 : hidden;
    const int64_t second = (room - p.shared_hidden * stride) / output_stride;
    p.shared_output = second < s.n ? second / 32 * 32 : s.n;
  }
  p.weight_hidden = take(p.shared_hidden * stride);
  p.weight_output = take(p.shared_output * output_stride);
  p.bytes = end;
  p.slots = slots;
  return p;
}

// slots: so many, or as many as fit; 0: what spreads the samples over the device.
// limit: bytes of shared memory that a block may have. twice: two blocks fit a multiprocessor, but
// for shared memory.
constexpr DensePlan dense_plan(const DenseShape& shape, int64_t samples, int slots,
                               int multiprocessors, int64_t limit, bool twice) {
  const auto within = [](int64_t wanted) {
    return static_cast<int>(wanted < 1 ? 1 : wanted > kMostSlots ? kMostSlots : wanted);
  };
  // While one block takes its step the other has its product; where rows are few, each would read
  // the weights for itself.
  constexpr int64_t kFewRows = 16;
  if (slots == 0 && twice && divide_up(samples, 2 * multiprocessors) >= kFewRows) {
    constexpr int64_t kReserved = 1024;  // bytes of each block
    const int64_t half = (limit + kReserved) / 2 - kReserved;
    const DensePlan p =
        dense_layout(shape, within(divide_up(samples, 2 * multiprocessors)), true, half);
    if (p.slots > 0 && p.panels == 0) {
      return p;
    }
  }
  DensePlan p = {};
  int wanted = within(slots > 0 ? slots : divide_up(samples, multiprocessors));
  for (; wanted > 0; wanted = wanted > 1 ? static_cast<int>(divide_up(wanted, 2)) : 0) {
    for (const bool is_shared : {true, false}) {
      p = dense_layout(shape, wanted, is_shared, limit);
      if (p.slots > 0) {
        return p;
      }
    }
  }
  return p;
}

// Whether a solve of that shape can be done where a block may have so many bytes of shared memory.
constexpr bool dense_fits(const DenseShape& shape, int64_t limit) {
  return dense_plan(shape, 1, 1, 1, limit, false).slots > 0;
}

// Device memory of a solve. Offsets in bytes.
struct DenseWork {
  int64_t x, gx;              // [blocks · slots][padded n], unless they are shared
  int64_t values, residuals;  // windows, [blocks · slots][m][padded n]; Picard: values, its trails
  int64_t gram;
  int64_t weight_hidden, weight_output;  // copies with padded rows, where the weights' are not
  int64_t zeroed;                        // so many bytes must be zero at first: DenseCounts
  int64_t bytes;
};

// A product alone.
struct DenseMapPlan {
  int slots;            // rows of a tile; 0: the shape does not fit
  int64_t shared_rows;  // rows of W that stay in shared memory
  // Shared memory, offsets in bytes.
  int64_t operand, weight, panels;
  int64_t bytes;
};

constexpr DenseMapPlan dense_map_plan(int64_t k, int64_t n, int value_bytes, int64_t rows,
                                      int multiprocessors, int64_t limit) {
  DenseMapPlan p = {};
  const int64_t stride = stride_of(k, value_bytes) * value_bytes;
  const int64_t spread = divide_up(rows, multiprocessors);
  int slots = static_cast<int>(spread < 1 ? 1 : spread > kMostSlots ? kMostSlots : spread);
  for (; slots > 0; slots = slots > 1 ? static_cast<int>(divide_up(slots, 2)) : 0) {
    const int64_t operand = slots * stride;
    const bool all = operand + n * stride <= limit;
    const int64_t room = limit - operand - (all ? 0 : 2 * kPanelBytes);
    if (room >= 0) {
      p.slots = slots;
      p.shared_rows = all ? n : room / stride / 32 * 32;
      p.panels = operand;
      p.weight = operand + (all ? 0 : 2 * kPanelBytes);
      p.bytes = p.weight + p.shared_rows * stride;
      return p;
    }
  }
  return p;
}

// A weight of rows by k is read in whole chunks.
constexpr bool is_padded(int64_t k, int value_bytes, bool aligned) {
  return aligned && padded_of(k, value_bytes) == k;
}

constexpr DenseWork dense_work(const DensePlan& p, const DenseShape& s, int64_t blocks,
                               bool copies_hidden, bool copies_output) {
  DenseWork w = {};
  w.zeroed = kPackBytes;
  int64_t end = w.zeroed;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, kPackBytes);
    return begin;
  };
  const int64_t rows = blocks * p.slots, padded = padded_of(s.n, s.value_bytes);
  const int64_t state = p.is_shared ? 0 : rows * padded * s.value_bytes;
  const bool is_picard = s.history == 1;
  const int64_t vectors = rows * padded * s.value_bytes;
  w.x = take(state);
  w.gx = take(state);
  w.values = take(vectors * (is_picard ? kTrailLength : s.history));
  w.residuals = take(is_picard ? 0 : vectors * s.history);
  w.gram = take(is_picard ? 0 : rows * s.history * s.history * s.acc_bytes);
  const int64_t hidden = s.hidden >= 0 ? s.hidden : 0;
  const int64_t last = s.hidden >= 0 ? hidden : s.n;
  w.weight_hidden = take(copies_hidden ? hidden * padded * s.value_bytes : 0);
  w.weight_output = take(copies_output ? s.n * padded_of(last, s.value_bytes) * s.value_bytes : 0);
  w.bytes = end;
  return w;
}

}  // namespace fpi::cuda
