#include "races.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulation.h"

namespace fpi::emulation {

// A thread's atomic, with all that its block could know then.
struct Release {
  uint32_t serial;
  int thread;
  uint32_t time;
  std::vector<Met> met;
  std::vector<Fence> fences;
};

namespace {

constexpr int kWarp = 32;

struct Access {
  uint32_t time = 0;  // 0: none
  uint32_t code = 0;  // the executable is linked at fixed addresses, below 4 GiB
  uint32_t serial = 0;
  uint16_t thread = 0;
  bool atomic = false;
};

// Of two reads, the last by different threads: whoever writes next, one of them is another's.
struct Cell {
  Access write, reads[2];
};
constexpr size_t kCellBytes = 2;  // no narrower value is shared between threads

struct Region {
  uintptr_t begin, end;
  std::string name;
  bool fresh;
  std::vector<Cell> cells;
};

std::map<uintptr_t, std::unique_ptr<Region>> regions;  // by their ends
std::unordered_map<const int32_t*, std::vector<Release>> released;
uint32_t now = 1;
uint32_t launched = 1;
History* block = nullptr;
int thread = 0;
bool uncached = false;

// Up to when one thread of a block knows what another did.
uint32_t up_to(const Met& met, int knows, int other) {
  return knows / kWarp == other / kWarp ? std::max(met.block, met.warp) : met.block;
}

// Is what thread a.thread did before this release of its block for all to see?
bool published(const Release& r, const Access& a) {
  if (r.serial != a.serial) {
    return false;
  }
  const Fence& own = r.fences[r.thread];
  if (r.thread == a.thread) {
    return a.time < own.time || (a.atomic && a.time <= r.time);
  }
  const Fence& others = r.fences[a.thread];
  return a.time < up_to(own.met, r.thread, a.thread) ||
         (others.time < up_to(r.met[r.thread], r.thread, a.thread) && a.time < others.time);
}

// Has the running thread heard of it, and does it not read an old copy?
bool known(const Access& a, bool fresh) {
  for (const Acquired& q : block->acquired) {
    const uint32_t heard =
        q.thread == thread ? now + 1 : up_to(block->met[thread], thread, q.thread);
    const uint32_t theirs = block->fences[q.thread].time;
    if (q.time >= heard ||
        !(fresh || block->fences[thread].time > q.time || (theirs > q.time && theirs < heard))) {
      continue;
    }
    for (size_t i = 0; i < q.count; ++i) {
      if (published((*q.releases)[i], a)) {
        return true;
      }
    }
  }
  return false;
}

bool ordered(const Access& before, const Access& a, bool fresh) {
  if (before.time < launched || (before.atomic && a.atomic)) {
    return true;
  }
  if (before.serial == a.serial) {
    return before.thread == a.thread ||
           before.time < up_to(block->met[thread], thread, before.thread);
  }
  return known(before, fresh);
}

std::string described(const Access& a, const char* what) {
  return std::string(a.atomic ? "atomic" : what) + " by thread " + std::to_string(a.thread) +
         " of block run " + std::to_string(a.serial) + " at " + place(a.code);
}

void check(uintptr_t address, size_t bytes, bool write, bool atomic, uintptr_t code) {
  if (block == nullptr) {
    return;
  }
  constexpr uint64_t kPrime = 0x100000001b3;  // FNV-1a
  block->ways[thread] = (block->ways[thread] ^ code) * kPrime;
  const auto found = regions.upper_bound(address);
  if (found == regions.end() || address < found->second->begin) {
    return;
  }
  Region& region = *found->second;
  const Access access{now, static_cast<uint32_t>(code), block->serial,
                      static_cast<uint16_t>(thread), atomic};
  const size_t first = (address - region.begin) / kCellBytes;
  for (size_t i = first; i <= (address + bytes - 1 - region.begin) / kCellBytes; ++i) {
    Cell& cell = region.cells[i];
    const auto conflict = [&](const Access& before, const char* what) {
      fail("race in " + region.name + ", byte " + std::to_string(address - region.begin) + ": " +
           described(before, what) + ", " + described(access, write ? "write" : "read"));
    };
    if (!write && region.fresh && cell.write.time == 0) {
      fail("nobody wrote " + region.name + ", byte " + std::to_string(address - region.begin) +
           ": " + described(access, "read"));
    }
    if (!ordered(cell.write, access, write || uncached)) {
      conflict(cell.write, "write");
    }
    if (write) {
      for (const Access& read : cell.reads) {
        if (!ordered(read, access, true)) {
          conflict(read, "read");
        }
      }
      cell.write = access;
    } else {
      Access& last = cell.reads[0];
      if (last.thread != access.thread || last.serial != access.serial) {
        cell.reads[1] = last;
      }
      last = access;
    }
  }
}

}  // namespace

Tracked::Tracked(const void* begin, size_t bytes, const std::string& name, Kind kind)
    : end_(reinterpret_cast<uintptr_t>(begin) + bytes) {
#if defined(FPI_RACES)
  if (bytes > 0) {
    regions[end_].reset(new Region{end_ - bytes, end_, name, kind == kFresh,
                                   std::vector<Cell>((bytes + kCellBytes - 1) / kCellBytes)});
  }
#else
  (void)name, (void)kind;
#endif
}

Tracked::~Tracked() { regions.erase(end_); }

Uncached::Uncached() { uncached = true; }
Uncached::~Uncached() { uncached = false; }

History::History(uint32_t number, int threads)
    : serial(number), met(threads), fences(threads), ways(threads) {}

void launch_began() {
  launched = ++now;
  released.clear();
}

void running(History* history, int index) {
  block = history;
  thread = index;
}

void touched(const void* begin, size_t bytes, bool write, uintptr_t code) {
  check(reinterpret_cast<uintptr_t>(begin), bytes, write, false, code);
}

void block_met(History& history) {
  ++now;
  for (Met& met : history.met) {
    met.block = now;
  }
  std::fill(history.ways.begin(), history.ways.end(), 0);
}

void warp_met(History& history, int first, int end) {
  ++now;
  for (int i = first; i < end; ++i) {
    history.met[i].warp = now;
    way_ended(history, i);
  }
}

bool came_one_way(const History& history, int first, int end) {
  const auto* ways = history.ways.data();
  return std::all_of(ways + first, ways + end, [&](uint64_t way) { return way == ways[first]; });
}

void way_ended(History& history, int index) { history.ways[index] = 0; }

void fence_passed(History& history, int index) {
  history.fences[index] = {++now, history.met[index]};
}

void atomic_made(History& history, int index, const int32_t* address, uintptr_t code) {
  check(reinterpret_cast<uintptr_t>(address), sizeof *address, true, true, code);
  auto& releases = released[address];
  history.acquired.push_back({&releases, releases.size(), index, now});
  releases.push_back({history.serial, index, now, history.met, history.fences});
  ++now;
}

}  // namespace fpi::emulation

#if defined(FPI_RACES)
#define FPI_ACCESS(NAME, BYTES, WRITE)                                               \
  extern "C" void __tsan_##NAME(void* address) {                                     \
    fpi::emulation::check(reinterpret_cast<uintptr_t>(address), BYTES, WRITE, false, \
                          reinterpret_cast<uintptr_t>(__builtin_return_address(0))); \
  }
#define FPI_ACCESSES(BYTES)                       \
  FPI_ACCESS(read##BYTES, BYTES, false)           \
  FPI_ACCESS(write##BYTES, BYTES, true)           \
  FPI_ACCESS(unaligned_read##BYTES, BYTES, false) \
  FPI_ACCESS(unaligned_write##BYTES, BYTES, true)
FPI_ACCESSES(1)
FPI_ACCESSES(2)
FPI_ACCESSES(4)
FPI_ACCESSES(8)
FPI_ACCESSES(16)
extern "C" void __tsan_read_range(void* address, size_t bytes) {
  fpi::emulation::check(reinterpret_cast<uintptr_t>(address), bytes, false, false,
                        reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  fpi::emulation::check(reinterpret_cast<uintptr_t>(address), bytes, true, false,
                        reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
#endif
