// Rows times a packed matrix, a block of sums in registers at a time.
//
// Weights are packed in panels: for as many outputs as kPanelVectors vectors hold, all inputs in
// their order. A sum runs over its inputs one by one, whatever block it is computed in: its bits
// depend on the instruction set and the dtype alone.
#pragma once

#include "vector.h"

namespace fpi::FPI_CPU_NAMESPACE {

constexpr int kPanelVectors = 2;
template <typename Acc>
constexpr int kPanel = kPanelVectors * kLanes<Acc>;

// Vectors of sums in a block; they leave registers for the weights that meet them.
#if defined(__AVX512F__)
constexpr int kBlockVectors = 24;
#else
constexpr int kBlockVectors = 12;
#endif
constexpr int kBlockRows = kBlockVectors / kPanelVectors;

// Few rows take several panels at a time: a sum waits for the one before it, so it takes eight or
// so at a time to keep the processor busy.
constexpr int block_panels(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

template <typename Acc>
FPI_HOST_DEVICE int64_t panels_of(int64_t outputs) {
  return (outputs + kPanel<Acc> - 1) / kPanel<Acc>;
}

// sums [kRows][kPanels kPanelVectors]: each row times each of kPanels panels that follow in memory.
template <int kRows, int kPanels, typename Acc>
__attribute__((noinline)) void block_sums(const Acc* const* rows, const Acc* panel, int64_t inputs,
                                          Vector<Acc>* sums) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t next_panel = inputs * kPanel<Acc>;
  const Acc* row[kRows];
  Vector<Acc> sum[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vector<Acc>{};
    }
  }
  for (int64_t i = 0; i < inputs; ++i) {
    Vector<Acc> weight[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      weight[v] = load(panel + v / kPanelVectors * next_panel + v % kPanelVectors * kLanes<Acc>);
    }
    panel += kPanel<Acc>;
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] += row[r][i] * weight[v];
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r * kVectors + v] = sum[r][v];
    }
  }
}

// Calls run(constant, first) for a block of `rows` rows, 1 to kRows.
template <int kRows, typename Run>
FPI_HOST_DEVICE void with_block_rows(int rows, const Run& run) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return with_block_rows<kRows - 1>(rows, run);
    }
  }
  run(std::integral_constant<int, kRows>{});
}

// finish(r, o, sums, vectors) gets the sums of rows[r] for the outputs from o on, for all of
// `count` rows and all outputs; the last vectors may reach beyond them.
template <typename Acc, typename Finish>
FPI_HOST_DEVICE void product(const Acc* const* rows, int count, const Acc* packed, int64_t inputs,
                             int64_t outputs, const Finish& finish) {
  if (count == 0) {
    return;
  }
  const int64_t panels = panels_of<Acc>(outputs);
  const int blocks = (count + kBlockRows - 1) / kBlockRows;
  int64_t panel = 0;
  while (panel < panels) {
    int64_t taken = 1;
    for (int b = 0; b < blocks; ++b) {
      // Blocks of nearly the same height: 8 rows are 4 and 4, not 6 and 2.
      const int first = b * count / blocks;
      const int height = (b + 1) * count / blocks - first;
      with_block_rows<kBlockRows>(height, [&](auto constant) {
        constexpr int kRows = constant.value, kMost = block_panels(kRows);
        Vector<Acc> sums[kRows * kMost * kPanelVectors];
        const Acc* begin = packed + panel * inputs * kPanel<Acc>;
        int vectors = kPanelVectors;
        if (kMost > 1 && blocks == 1 && panel + kMost <= panels) {
          block_sums<kRows, kMost>(rows + first, begin, inputs, sums);
          vectors = kMost * kPanelVectors;
          taken = kMost;
        } else {
          block_sums<kRows, 1>(rows + first, begin, inputs, sums);
        }
        for (int r = 0; r < kRows; ++r) {
          finish(first + r, panel * kPanel<Acc>, sums + r * vectors, vectors);
        }
      });
    }
    panel += taken;
  }
}

}  // namespace fpi::FPI_CPU_NAMESPACE
