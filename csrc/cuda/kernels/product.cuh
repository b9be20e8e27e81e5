// out[i][j] = Σ_k a[i][k] W[j][k], by a block, for the rows of a tile in shared memory.
//
// A value is one chain of sums over k in ascending order (the exact product) or in ascending chunks
// of 32 bytes (tensor cores), begun at 0. So its bits depend on the row and on W alone: not on the
// number of rows, on how warps share the tile, or on whether W stays in shared memory or comes in
// panels.
#pragma once

#include <math.h>

#include "../../math/dense.h"
#include "../dense_plan.h"
#include "pack.cuh"

namespace fpi::cuda {

FPI_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FPI_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Rows of a tile, padded with zeros to whole chunks.
template <typename T>
struct Rows {
  const T* values;
  int stride;
  int count;
};

// W as the product sees it. Rows of `source`, in device memory, are padded with zeros to whole
// chunks; the first `shared_rows` are in shared memory too.
template <typename T>
struct Weight {
  const T* source;
  const T* shared;
  int padded;  // k, in whole chunks
  int stride;  // of shared
  int rows, shared_rows;
};

// Starts to copy the first rows of a weight to shared memory.
template <typename T>
FPI_DEVICE void share_rows(const DenseLayer<T>& layer, int64_t count, T* shared) {
  constexpr int kPack = kWidth<T>;
  const int packs = static_cast<int>(layer.out_stride) / kPack;
  const int stride = static_cast<int>(stride_of(layer.in, static_cast<int>(sizeof(T))));
  for (int i = thread_index(); i < count * packs; i += kDenseThreads) {
    const int row = i / packs, p = i % packs;
    async_copy_16(shared + row * stride + p * kPack, layer.weight + int64_t{i} * kPack);
  }
  async_commit();
}

// Rows of a weight as the product reads them: W itself, or a copy with zeros behind each row.
template <typename T>
struct PadRows {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int64_t kMaxGrid = 1024;

  const T* from;
  T* to;
  int64_t rows, k, padded;

  int64_t blocks() const {
    const int64_t wanted = divide_up(rows * padded, kThreads);
    return wanted < kMaxGrid ? wanted : kMaxGrid;
  }

  FPI_DEVICE void operator()() const {
    for (int64_t i = block_index() * kThreads + thread_index(); i < rows * padded;
         i += grid_size() * kThreads) {
      const int64_t row = i / padded, column = i % padded;
      to[i] = column < k ? from[row * k + column] : T(0.0f);
    }
  }
};

// What a warp has in hand: kRows × kColumns values. Lane l's are those of every row in the columns
// l, l + 32, …
template <typename T, int kHigh, int kWide>
struct ExactTile {
  static constexpr int kRows = kHigh, kColumns = kWide * kWarp, kStep = kWidth<T>;
  static constexpr int kUnroll = kWide > 1 ? 1 : kHigh > 2 ? 2 : 4;
  static constexpr bool kByWarp = false;
  using Acc = T;

  const T *a, *b;
  int a_offsets[kHigh], b_offsets[kWide];
  T acc[kHigh][kWide];

  FPI_DEVICE void clear() {
#pragma unroll
    for (int e = 0; e < kHigh * kWide; ++e) {
      acc[e / kWide][e % kWide] = T(0);
    }
  }

  FPI_DEVICE void place_a(const T* rows, int stride, int last) {
    a = rows;
#pragma unroll
    for (int r = 0; r < kHigh; ++r) {
      a_offsets[r] = (r < last ? r : last) * stride;
    }
  }
  FPI_DEVICE void place_b(const T* rows, int stride, int last) {
    b = rows;
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      const int row = c * kWarp + thread_index() % kWarp;
      b_offsets[c] = (row < last ? row : last) * stride;
    }
  }

  FPI_DEVICE void add(int k_a, int k_b) {
    const Access<T, kStep> access;
    Pack<T, kStep> bs[kWide];
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      bs[c] = access.load(b + b_offsets[c] + k_b);
    }
#pragma unroll
    for (int r = 0; r < kHigh; ++r) {
      const auto as = access.load(a + a_offsets[r] + k_a);
#pragma unroll
      for (int l = 0; l < kStep; ++l) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          acc[r][c] = multiply_add(as.values[l], bs[c].values[l], acc[r][c]);
        }
      }
    }
  }

  // take(row, column, value) of this lane's values, row by row. The values move up instead of the
  // row's number: registers have no addresses, and `take` is large code.
  template <typename Take>
  FPI_DEVICE void each(const Take& take) {
#pragma unroll 1
    for (int row = 0; row < kHigh; ++row) {
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        take(row, c * kWarp + thread_index() % kWarp, acc[0][c]);
      }
#pragma unroll
      for (int r = 1; r < kHigh; ++r) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          acc[r - 1][c] = acc[r][c];
        }
      }
    }
  }
};

// The same on tensor cores. float is rounded to tf32.
template <typename T, int kHigh, int kWide>
struct MatrixTile {
  static constexpr int kRows = kHigh * 16, kColumns = kWide * 8;
  static constexpr int kStep = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kUnroll = kHigh > 1 ? 1 : 2;
  static constexpr bool kByWarp = true;
  using Acc = float;

  MatrixProduct<T, kHigh, kWide> product;
  float acc[kHigh][kWide][4];

  FPI_DEVICE void clear() {
#pragma unroll
    for (int e = 0; e < kHigh * kWide * 4; ++e) {
      acc[e / 4 / kWide][e / 4 % kWide][e % 4] = 0;
    }
  }
  FPI_DEVICE void place_a(const T* rows, int stride, int last) {
    product.place_a(rows, stride, last);
  }
  FPI_DEVICE void place_b(const T* rows, int stride, int last) {
    product.place_b(rows, stride, last);
  }
  FPI_DEVICE void add(int k_a, int k_b) { product.add(acc, k_a, k_b); }

  template <typename Take>
  FPI_DEVICE void each(const Take& take) {
    const int lane = thread_index() % kWarp;
#pragma unroll 1
    for (int place = 0; place < kHigh * kWide; ++place) {
      const int row = place / kWide * 16 + lane / 4, column = place % kWide * 8 + lane % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        take(row + e / 2 * 8, column + e % 2, acc[0][0][e]);
      }
#pragma unroll
      for (int next = 1; next < kHigh * kWide; ++next) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[(next - 1) / kWide][(next - 1) % kWide][e] = acc[next / kWide][next % kWide][e];
        }
      }
    }
  }
};

// The panels of a weight's rows that do not stay in shared memory, in the order in which a product
// takes them. All threads of the block bring them.
template <typename T>
struct Panels {
  static constexpr int kPack = kWidth<T>;

  const Weight<T>& weight;
  T* buffers;
  int slab;   // most rows of a panel
  int depth;  // of k
  int row, k;
  int which = 0;

  FPI_DEVICE Panels(const Weight<T>& w, T* memory, int rows_at_a_time)
      : weight(w), buffers(memory), slab(rows_at_a_time), row(w.shared_rows), k(0) {
    int spread = kPanelRows / slab;
    spread = spread >= 8 ? 8 : spread >= 4 ? 4 : spread >= 2 ? 2 : 1;
    depth = spread * (kPanelDepthBytes / static_cast<int>(sizeof(T)));
  }

  FPI_DEVICE int stride() const { return depth + kPack; }
  FPI_DEVICE T* buffer(int b) const {
    return buffers + b * (kPanelBytes / static_cast<int64_t>(sizeof(T)));
  }

  // Starts to bring the next one, if there is one.
  FPI_DEVICE void bring() {
    if (row >= weight.rows || weight.padded == 0) {
      return;
    }
    const int rows = row + slab < weight.rows ? slab : weight.rows - row;
    const int packs = (k + depth < weight.padded ? depth : weight.padded - k) / kPack;
    const T* from = weight.source + static_cast<int64_t>(row) * weight.padded + k;
    T* to = buffer(which);
    for (int i = thread_index(); i < rows * packs; i += block_size()) {
      const int r = i / packs, p = i % packs;
      async_copy_16(to + r * stride() + p * kPack,
                    from + static_cast<int64_t>(r) * weight.padded + p * kPack);
    }
    async_commit();
    which ^= 1;
    k += depth;
    if (k >= weight.padded) {
      k = 0;
      row += slab;
    }
  }
};

// take(i, j, sum) for every value of the product. panels: shared memory for two, free behind a
// barrier. No thread may change the rows before the next barrier.
template <typename Tile, typename T, typename Take>
FPI_DEVICE void product_by(const Rows<T>& rows, const Weight<T>& weight, T* panels,
                           const Take& take) {
  // Warps side by side, in groups that have a row of tiles each.
  const int warp = thread_index() / kWarp;
  const int groups = static_cast<int>(divide_up(rows.count, Tile::kRows));
  const int slab = slab_of({Tile::kRows, Tile::kColumns}, rows.count);
  const int top = warp % groups * Tile::kRows;
  const int across = warp / groups * Tile::kColumns;
  const int left = across < slab ? across : weight.rows;

  Panels<T> coming(weight, panels, slab);
  coming.bring();
  Tile tile;
  tile.place_a(rows.values + top * rows.stride, rows.stride, rows.count - 1 - top);
  for (int first = 0; first < weight.rows;) {
    const bool is_shared = first < weight.shared_rows;
    const int limit = is_shared ? weight.shared_rows : weight.rows;
    const int end = first + slab < limit ? first + slab : limit;
    const bool is_mine = first + left < end;
    const int last = end - 1 - first - left;
    tile.clear();
    if (is_shared && is_mine) {
      tile.place_b(weight.shared + (first + left) * weight.stride, weight.stride, last);
    }
    const int depth = is_shared ? weight.padded : coming.depth;
    for (int k = 0; k < weight.padded; k += depth) {
      if (!is_shared) {
        const T* panel = coming.buffer(coming.which ^ 1);
        async_wait<0>();
        block_barrier();  // the panel is there, and the one before is no longer read
        coming.bring();
        if (is_mine) {
          tile.place_b(panel + left * coming.stride(), coming.stride(), last);
        }
      }
      const int some = k + depth < weight.padded ? depth : weight.padded - k;
      if (is_mine) {
        if constexpr (Tile::kByWarp) {
          warp_barrier();  // lanes may have parted in `bring` here, or in `take` of the slab before
        }
#pragma unroll Tile::kUnroll
        for (int i = 0; i < some; i += Tile::kStep) {
          tile.add(k + i, i);
        }
      }
    }
    if (is_mine) {
      tile.each([&](int row, int column, typename Tile::Acc sum) {
        if (top + row < rows.count && first + left + column < end) {
          take(top + row, first + left + column, sum);
        }
      });
    }
    first = end;
  }
}

// kMatrix: on tensor cores.
template <bool kMatrix, typename T, typename Take>
FPI_DEVICE void product(const Rows<T>& rows, const Weight<T>& weight, T* panels, const Take& take) {
  const ProductTile tile = tile_of(kMatrix, rows.count, weight.rows);
  if constexpr (kMatrix) {
    if (tile.rows == 32) {
      product_by<MatrixTile<T, 2, 4>>(rows, weight, panels, take);
    } else {
      product_by<MatrixTile<T, 1, 2>>(rows, weight, panels, take);
    }
  } else {
    if (tile.columns == 4 * kWarp) {
      product_by<ExactTile<T, 8, 4>>(rows, weight, panels, take);
    } else if (tile.columns == 2 * kWarp) {
      product_by<ExactTile<T, 8, 2>>(rows, weight, panels, take);
    } else if (tile.rows == 8) {
      product_by<ExactTile<T, 8, 1>>(rows, weight, panels, take);
    } else {
      product_by<ExactTile<T, 2, 1>>(rows, weight, panels, take);
    }
  }
}

}  // namespace fpi::cuda
