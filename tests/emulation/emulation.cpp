#include "emulation.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bitset>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the caller's stack and registers at *from and goes on where `to` was saved. swapcontext
// would also save the signal mask, by a system call each time.
#if !defined(__x86_64__)
#error "fpi_switch is written for x86-64"
#endif
asm(R"(
.text
fpi_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void fpi_switch(void** from, void* to);

namespace fpi::emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;  // of a block, and
constexpr size_t kPlainSharedBytes = 48
                                     << 10;  // its bytes, where a launch asks for nothing special,
constexpr size_t kMostSharedBytes = 227 << 10;  // and where it does
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kWidest = 16;     // bytes of a shuffled value
constexpr size_t kCopyBytes = 16;  // of an async copy

void fiber_main();

// A stack that runs one thread's work after another's.
class Fiber {
 public:
  Fiber() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      fail("no memory for a fiber's stack");
    }
    stack_ = static_cast<char*>(memory) + page;
    // What fpi_switch pops: six registers and the address to return to. Above it lies the return
    // address of fiber_main, null, which also aligns the stack as a call would.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
    top[6] = reinterpret_cast<void*>(fiber_main);
    saved_ = top;
  }

  // Runs the fiber until it leaves. The scheduler calls this, the fiber the other.
  void enter() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
#endif
    fpi_switch(&scheduler_, saved_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, scheduler_stack_, scheduler_bytes_);
#endif
    fpi_switch(&saved_, scheduler_);
    entered();
  }

  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

 private:
  char* stack_;
  void* saved_;
  void* scheduler_ = nullptr;
  [[maybe_unused]] void* fake_ = nullptr;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_bytes_ = 0;
};

// One shuffle of a warp. The next may begin before every lane has taken its value; the one after
// may not, so two take turns.
struct Exchange {
  unsigned char values[kWarp][kWidest];
};

// Those of a block, or of a warp, that wait for the rest, and the call that they wait at.
struct Meeting {
  int arrived = 0;
  uintptr_t caller = 0;
};

struct Warp : Meeting {
  Exchange exchanges[2];
};

struct Copy {
  unsigned char* to;
  unsigned char bytes[kCopyBytes];
};

struct Thread {
  Fiber* fiber;
  int exchanges = 0;
  std::deque<std::vector<Copy>> copies = {};  // on their way, by groups; the last is still open
};

struct Block : Meeting {
  int64_t index;
  History history;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::bitset<kMostThreads> runnable;  // by place in the order
  int finished = 0;                    // threads that came to the body's end
  // Of the exact size, for AddressSanitizer; malloc aligns it to 16.
  std::unique_ptr<unsigned char, decltype(&std::free)> shared;
  Tracked tracked;

  Block(int64_t number, int size, size_t bytes);
};

struct Launch {
  void (*body)(const void*);
  const void* argument;
  int threads;
  int64_t blocks;
};

size_t allowed = kPlainSharedBytes;
Options options;
std::mt19937_64 generator;
std::map<uintptr_t, const char*> calls;  // of barriers and fences; their kinds
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
std::vector<std::unique_ptr<Block>> alive;
uint32_t serial = 0;
Launch launched;
Block* block = nullptr;  // whose thread runs
int thread = 0;

uintptr_t address(void* code) { return reinterpret_cast<uintptr_t>(code); }

// One call in the source may be several in the code.
bool same(uintptr_t a, uintptr_t b) { return a == b || place(a) == place(b); }

std::string who() {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block->index);
}

size_t drawn(size_t count) { return generator() % count; }

// A thread's place in the order and back.
int placed(int index) {
  return options.order == Order::kReverse ? launched.threads - 1 - index : index;
}

Fiber* idle_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>());
    return fibers.back().get();
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

Block::Block(int64_t number, int size, size_t bytes)
    : index(number),
      history(++serial, size),
      warps(size / kWarp),
      shared(static_cast<unsigned char*>(std::malloc(bytes)), &std::free),
      tracked(shared.get(), bytes, "shared memory", Tracked::kFresh) {
  std::memset(shared.get(), 0xff, bytes);  // NaN in every format
  for (int i = 0; i < size; ++i) {
    threads.push_back({idle_fiber()});
    runnable.set(i);
  }
}

void yield() { block->threads[thread].fiber->leave(); }

void wait() {
  block->runnable.reset(placed(thread));
  yield();
}

// A fiber's work: the body for one thread, then for the next that the scheduler gives it.
void fiber_main() {
  block->threads[thread].fiber->entered();
  for (;;) {
    launched.body(launched.argument);
    if (block->arrived > 0) {
      fail(who() + " ended while others wait at " + place(block->caller));
    }
    for (const auto& group : block->threads[thread].copies) {
      if (!group.empty()) {
        fail(who() + " ended before its copies arrived");
      }
    }
    ++block->finished;
    wait();
  }
}

// Runs a thread of the block to its next primitive.
void resume(Block& b) {
  size_t next = options.order == Order::kRandom ? drawn(launched.threads) : 0;
  if (next == 0 || (next = b.runnable._Find_next(next - 1)) == b.runnable.size()) {
    next = b.runnable._Find_first();
  }
  if (next == b.runnable.size()) {
    for (const Warp& warp : b.warps) {
      if (warp.arrived > 0) {
        fail("block " + std::to_string(b.index) + " is stuck: " + std::to_string(warp.arrived) +
             " lanes of a warp wait at " + place(warp.caller) + ", " + std::to_string(b.arrived) +
             " threads for the block, " + std::to_string(b.finished) + " have ended");
      }
    }
  }
  block = &b;
  thread = placed(static_cast<int>(next));
  running(&b.history, thread);
  b.threads[thread].fiber->enter();
  running(nullptr, 0);
}

bool is_deleted(const char* kind, uintptr_t caller) {
  calls[caller] = kind;
  const auto& deleted = options.deleted;
  return std::find(deleted.begin(), deleted.end(), caller) != deleted.end();
}

// The running thread arrives; the last to do so takes note of it and lets all go on.
template <typename Note>
void meet(Meeting& meeting, int first, int end, uintptr_t caller, const Note& note) {
  if (meeting.arrived > 0 && !same(meeting.caller, caller)) {
    fail(who() + " waits at " + place(caller) + ", others at " + place(meeting.caller));
  }
  meeting.caller = caller;
  if (++meeting.arrived < end - first) {
    return wait();
  }
  meeting.arrived = 0;
  note();
  for (int i = first; i < end; ++i) {
    block->runnable.set(placed(i));
  }
  yield();
}

}  // namespace

void configure(const Options& wanted) {
  options = wanted;
  generator.seed(wanted.seed);
  calls.clear();
}

std::vector<Reached> reached() {
  std::vector<Reached> all;
  for (const auto& [caller, kind] : calls) {
    all.push_back({kind, caller});
  }
  return all;
}

std::string place(uintptr_t code) {
  static std::map<uintptr_t, std::string> known;
  std::string& chain = known[code];
  if (chain.empty()) {
    char command[80];
    std::snprintf(command, sizeof command, "addr2line -s -i -e /proc/%d/exe %zx", getpid(),
                  code - 1);
    FILE* lines = popen(command, "r");
    for (int c; lines != nullptr && (c = std::fgetc(lines)) != EOF;) {
      chain += c == '\n' ? ' ' : static_cast<char>(c);
    }
    pclose(lines);
  }
  return chain;
}

void fail(const std::string& message) {
  std::fprintf(stderr, "emulation: %s\n", message.c_str());
  std::_Exit(3);
}

int thread_index() { return thread; }
int block_size() { return launched.threads; }
int64_t block_index() { return block->index; }
int64_t grid_size() { return launched.blocks; }
unsigned char* shared_memory() { return block->shared.get(); }

void block_barrier() {
  const uintptr_t caller = address(__builtin_return_address(0));
  if (is_deleted("barrier", caller)) {
    return yield();
  }
  if (block->finished > 0) {
    fail(who() + " waits at " + place(caller) + ", but others have ended");
  }
  meet(*block, 0, launched.threads, caller, [] { block_met(block->history); });
}

void warp_barrier() {
  const uintptr_t caller = address(__builtin_return_address(0));
  if (is_deleted("warp barrier", caller)) {
    return yield();
  }
  const int first = thread / kWarp * kWarp;
  meet(block->warps[thread / kWarp], first, first + kWarp, caller,
       [&] { warp_met(block->history, first, first + kWarp); });
}

void device_fence() {
  if (!is_deleted("fence", address(__builtin_return_address(0)))) {
    fence_passed(block->history, thread);
  }
  yield();
}

int32_t atomic_add(int32_t* target, int32_t value) {
  yield();
  atomic_made(block->history, thread, target, address(__builtin_return_address(0)));
  const int32_t before = *target;
  *target = before + value;
  return before;
}

int32_t atomic_max(int32_t* target, int32_t value) {
  yield();
  atomic_made(block->history, thread, target, address(__builtin_return_address(0)));
  const int32_t before = *target;
  *target = std::max(before, value);
  return before;
}

void async_copy_16(void* shared, const void* global) {
  const uintptr_t caller = address(__builtin_return_address(0));
  if (reinterpret_cast<uintptr_t>(shared) % kCopyBytes != 0 ||
      reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) {
    fail(who() + " copies from or to no multiple of 16 bytes at " + place(caller));
  }
  touched(global, kCopyBytes, false, caller);
  touched(shared, kCopyBytes, true, caller);
  auto& copies = block->threads[thread].copies;
  if (copies.empty()) {
    copies.emplace_back();
  }
  copies.back().push_back({static_cast<unsigned char*>(shared), {}});
  std::memcpy(copies.back().back().bytes, global, kCopyBytes);
  std::memset(shared, 0xff, kCopyBytes);
}

void async_commit() {
  auto& copies = block->threads[thread].copies;
  if (copies.empty()) {
    copies.emplace_back();
  }
  copies.emplace_back();
}

void async_wait(int left) {
  const uintptr_t caller = address(__builtin_return_address(0));
  auto& copies = block->threads[thread].copies;
  if (!is_deleted("async wait", caller)) {
    while (copies.size() > static_cast<size_t>(left) + 1) {
      for (const Copy& copy : copies.front()) {
        touched(copy.to, kCopyBytes, true, caller);
        std::memcpy(copy.to, copy.bytes, kCopyBytes);
      }
      copies.pop_front();
    }
  }
  yield();
}

void allow_shared(size_t bytes) { allowed = std::min(bytes, kMostSharedBytes); }

void exchange(const void* value, void* result, size_t bytes, int source) {
  const uintptr_t caller = address(__builtin_return_address(0));
  Warp& warp = block->warps[thread / kWarp];
  const int lane = thread % kWarp;
  if (source < 0 || source >= kWarp || bytes > kWidest) {
    fail(who() + " shuffles " + std::to_string(bytes) + " bytes from lane " +
         std::to_string(source) + " at " + place(caller));
  }
  Exchange& exchange = warp.exchanges[block->threads[thread].exchanges++ % 2];
  std::memcpy(exchange.values[lane], value, bytes);
  meet(warp, thread - lane, thread - lane + kWarp, caller, [] {});
  std::memcpy(result, exchange.values[source], bytes);
}

Together::Together() {
  const uintptr_t caller = address(__builtin_return_address(0));
  const int first = thread / kWarp * kWarp;
  meet(block->warps[thread / kWarp], first, first + kWarp, caller, [&] {
    if (!came_one_way(block->history, first, first + kWarp)) {
      fail("lanes of the warp of " + who() +
           " came by different ways, with no barrier between, to " + place(caller));
    }
  });
}

Together::~Together() { way_ended(block->history, thread); }

void run(void (*body)(const void*), const void* argument, int threads, int64_t blocks,
         size_t shared_bytes) {
  if (blocks < 1 || threads > kMostThreads || shared_bytes > allowed) {
    fail("no device launches " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
         " threads with " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  allowed = kPlainSharedBytes;
  launched = {body, argument, threads, blocks};
  launch_began();
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (options.order == Order::kReverse) {
    std::reverse(order.begin(), order.end());
  } else if (options.order == Order::kRandom) {
    std::shuffle(order.begin(), order.end(), generator);
  }
  for (size_t next = 0; next < order.size() || !alive.empty();) {
    while (alive.size() < options.alive && next < order.size()) {
      alive.push_back(std::make_unique<Block>(order[next++], threads, shared_bytes));
    }
    const size_t i = options.order == Order::kRandom ? drawn(alive.size()) : 0;
    Block& b = *alive[i];
    resume(b);
    if (b.finished == threads) {
      for (const Thread& t : b.threads) {
        idle.push_back(t.fiber);
      }
      alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

}  // namespace fpi::emulation
