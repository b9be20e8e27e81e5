// Which of two accesses came first, told by barriers, fences and atomics alone.
//
// A build with -fsanitize=thread calls __tsan_read4(address) and its like before every access; they
// are defined in races.cpp, without the run time library of that sanitizer. Any two accesses of
// tracked memory, one of them a write, must then be ordered:
//   in a block     by a barrier between them, the block's or their warp's, or by being one
//   thread's; across blocks  by a fence and an atomic of the first, an atomic of the second on the
//   same
//                  address, and barriers where other threads of the block are concerned. The second
//                  must read past its cache (load_uncached) or pass a fence of its own before.
// Shuffles order nothing.
//
// A thread's way is told by the code of its accesses, of any memory: lanes whose sequences differ
// have parted. A barrier joins them again; after a shuffle the machine need not. In a build without
// that instrumentation nothing here ever complains.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fpi::emulation {

// Bytes whose accesses are checked, from construction to destruction; no other access is.
class Tracked {
 public:
  // kFresh: nobody has written these bytes, so a read is an error.
  enum Kind { kGiven, kFresh };
  Tracked(const void* begin, size_t bytes, const std::string& name, Kind kind);
  ~Tracked();
  Tracked(const Tracked&) = delete;

 private:
  uintptr_t end_;
};

// While it lives, the running thread reads past its cache.
struct Uncached {
  Uncached();
  ~Uncached();
};

// Up to when a thread knows what its block, and its warp, did.
struct Met {
  uint32_t block = 0;
  uint32_t warp = 0;
};

// A thread's last fence.
struct Fence {
  uint32_t time = 0;  // 0: none yet
  Met met;            // of the barriers before
};

struct Release;

// An atomic's hold on what was released at its address before.
struct Acquired {
  const std::vector<Release>* releases;
  size_t count;
  int thread;
  uint32_t time;
};

// What the detector keeps of a block. The scheduler owns it.
struct History {
  History(uint32_t serial, int threads);
  uint32_t serial;  // of all blocks of all launches, from 1
  std::vector<Met> met;
  std::vector<Fence> fences;
  std::vector<Acquired> acquired;
  std::vector<uint64_t> ways;  // a hash of each thread's accesses since it met others
};

// Called by the scheduler and the primitives.
void launch_began();
void running(History* block, int thread);  // the accesses that follow are this thread's
void touched(const void* address, size_t bytes, bool write, uintptr_t code);  // by a primitive
void block_met(History& block);
void warp_met(History& block, int first, int end);
void fence_passed(History& block, int thread);
bool came_one_way(const History& block, int first, int end);
void way_ended(History& block, int thread);
void atomic_made(History& block, int thread, const int32_t* address, uintptr_t code);

}  // namespace fpi::emulation
