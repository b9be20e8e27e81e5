// How the rows of a step are laid over blocks, and the shared and scratch memory that takes. Pure
// C++, so that tests run the plans that the operators run.
//
//   a  a warp a row, four rows a block       rows up to 1 KiB       one launch
//   b  a block a row                         rows up to 16 KiB      one launch
//   c  several blocks a row                  beyond                 two launches
//
// The plan of a row follows from N and dtype alone, and so does the order of every sum: a sample's
// bits are the same in any batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/macros.h"

namespace fpi::cuda {

constexpr int kStepThreads = 128;  // of a block
constexpr int kWarpThreads = 32;
constexpr int kStepWarps = kStepThreads / kWarpThreads;
constexpr int kPackBytes = 16;  // the widest access

// Two of the row's vectors are kept in shared memory in a and b. A warp's four rows, and a block's
// one, with the largest window, stay below the 48 KiB that need no leave.
constexpr int64_t kWarpRowBytes = 1024;
constexpr int64_t kBlockRowBytes = 16384;
// A row's last block adds up what the others found, so their number is bounded.
constexpr int64_t kMaxParts = 4096;

constexpr int kMaxHistoryCuda = 32;
constexpr int kGroup = 4;  // differences whose dot products are taken together

FPI_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct Plan {
  int team;            // threads that work on a row (a, b) or on a part of one (c)
  int rows_per_block;  // 1 but in a
  int64_t parts;       // of a row, a block each; 1 but in c
  int64_t span;        // values of a part, in whole packs but for the last one
};

constexpr Plan plan_of(int64_t n, int value_bytes) {
  const int64_t bytes = n * value_bytes;
  if (bytes <= kWarpRowBytes) {
    return {kWarpThreads, kStepWarps, 1, n};
  }
  if (bytes <= kBlockRowBytes) {
    return {kStepThreads, 1, 1, n};
  }
  const int64_t wanted = divide_up(bytes, kBlockRowBytes);
  const int64_t span =
      round_up(divide_up(n, wanted < kMaxParts ? wanted : kMaxParts), kPackBytes / value_bytes);
  return {kStepThreads, 1, divide_up(n, span), span};
}

// A grid without blocks is a launch error; its one block brings the tally up to date.
constexpr int64_t blocks_of(const Plan& plan, int64_t rows) {
  const int64_t blocks = divide_up(rows, plan.rows_per_block) * plan.parts;
  return blocks > 0 ? blocks : 1;
}

// Sums that a step takes of a row. Anderson: five, and eight for every group of differences.
constexpr int kPicardSums = 2;
FPI_HOST_DEVICE constexpr int anderson_sums(int m) {
  return 5 + 2 * kGroup * static_cast<int>(divide_up(m - 1, kGroup));
}

// A block's shared memory: BlockShared of rows.cuh, then each team's part, of which these are the
// offsets in bytes.
struct TeamShared {
  int sums;     // of the row or part, Acc; no fewer than 2 kGroup
  int stage;    // of each warp, Acc [warps][2 kGroup]
  int gamma;    // Acc [m − 1], the right-hand side first
  int system;   // Acc [m − 1][m − 1]
  int vectors;  // two that the second pass would read again, in a and b
  int bytes;    // of the part
};

constexpr int kBlockSharedBytes = 64;

constexpr TeamShared team_shared_of(const Plan& plan, int64_t n, int value_bytes, int acc_bytes,
                                    int sums, int m) {
  constexpr int kMoveBytes = 16;  // Move of rows.cuh
  TeamShared shared = {};
  shared.sums = kMoveBytes;
  const int room = sums < 2 * kGroup ? 2 * kGroup : sums;
  shared.stage = static_cast<int>(round_up(shared.sums + room * acc_bytes, kPackBytes));
  const int warps = plan.team / kWarpThreads;
  shared.gamma = shared.stage + warps * 2 * kGroup * acc_bytes;
  shared.system = static_cast<int>(round_up(shared.gamma + (m - 1) * acc_bytes, kPackBytes));
  shared.vectors =
      static_cast<int>(round_up(shared.system + (m - 1) * (m - 1) * acc_bytes, kPackBytes));
  const int64_t vector = plan.parts == 1 ? round_up(n * value_bytes, kPackBytes) : 0;
  shared.bytes = static_cast<int>(shared.vectors + 2 * vector);
  return shared;
}

constexpr size_t shared_bytes(const Plan& plan, const TeamShared& shared) {
  return static_cast<size_t>(kBlockSharedBytes + plan.rows_per_block * shared.bytes);
}

// Device memory that a step needs between its blocks and launches. Offsets in bytes.
struct Scratch {
  int64_t arrivals;  // int32 [R]: parts of a row that have their sums
  int64_t moves;     // Move [R]
  int64_t gamma;     // Acc [R][m − 1]
  int64_t partials;  // Acc [R][sums][parts]
  int64_t zeroed;    // so many bytes must be zero at first: int32 [3] counts, and the arrivals
  int64_t bytes;
};

constexpr Scratch scratch_of(const Plan& plan, int64_t rows, int acc_bytes, int sums, int m) {
  constexpr int64_t kMoveBytes = 12, kCountBytes = 16;
  Scratch scratch = {};
  const int64_t r = plan.parts > 1 ? rows : 0;  // one launch needs the counts only
  scratch.arrivals = kCountBytes;
  scratch.zeroed = kCountBytes + r * 4;
  scratch.moves = round_up(scratch.zeroed, kPackBytes);
  scratch.gamma = round_up(scratch.moves + r * kMoveBytes, kPackBytes);
  scratch.partials = round_up(scratch.gamma + r * (m - 1) * acc_bytes, kPackBytes);
  scratch.bytes = scratch.partials + r * sums * plan.parts * acc_bytes;
  return scratch;
}

}  // namespace fpi::cuda
