// Long calls of the CPU operators can be broken off: by Ctrl-C, or by whatever a signal's handler
// raises.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "../checks.h"

namespace fpi::cpu {

// Whether the program wants the call that asks to end: runs what waits for the thread that called
// the operator (handlers of signals), and does not throw. Set by what embeds the operators, which
// know nothing of Python (csrc/module.cpp); null: nothing to ask.
using AskToStop = bool (*)();
inline std::atomic<AskToStop> ask_to_stop{nullptr};

// In the message of a call that ended so.
constexpr const char* kInterrupted = "interrupted by the handler of a signal";

// Of one call. Threads that work for it ask stopped() after each piece of work; the one that called
// the operator, which alone may run handlers, asks the program once in kPause.
class Watch {
  using Clock = std::chrono::steady_clock;

 public:
  static constexpr auto kPause = std::chrono::milliseconds(50);

  // Whether to leave off. Costs a thread that is not the caller's one flag, the caller's a clock.
  bool stopped() {
    if (!stop_.load(std::memory_order_relaxed) && std::this_thread::get_id() == caller_ &&
        Clock::now() - asked_ >= kPause) {
      const AskToStop ask = ask_to_stop.load();
      if (ask != nullptr && ask()) {
        stop_.store(true, std::memory_order_relaxed);
      }
      asked_ = Clock::now();  // a handler may have taken long
    }
    return stop_.load(std::memory_order_relaxed);
  }

  // stopped() for kernels.
  static bool stopped(void* watch) { return static_cast<Watch*>(watch)->stopped(); }

  // Raises where the call was broken off: after its threads have ended.
  void check(const char* op) const {
    FPI_CHECK(!stop_.load(std::memory_order_relaxed), op, ": ", kInterrupted);
  }

  // Runs work(worker) for each of `workers`, on as many threads as there are.
  template <typename Work>
  void on_workers(int64_t workers, const Work& work) {
    std::atomic<int64_t> left{workers};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        work(worker);
      }
      if (left.fetch_sub(end - begin) > end - begin) {
        await(left);
      } else if (end - begin < workers) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_one();
      }
    });
  }

 private:
  // The caller's thread, when it has no work any more, asks on while others have.
  void await(const std::atomic<int64_t>& left) {
    if (std::this_thread::get_id() != caller_) {
      return;
    }
    constexpr auto kSpin = std::chrono::milliseconds(1);  // to be woken takes a twentieth of that
    for (const auto begin = Clock::now(); Clock::now() - begin < kSpin;) {
      if (left.load() == 0) {
        return;
      }
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!all_done_.wait_for(lock, kPause, [&] { return left.load() == 0; })) {
      lock.unlock();
      stopped();
      lock.lock();
    }
  }

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point asked_ = Clock::now();  // only the caller's thread reads and writes it
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

}  // namespace fpi::cpu
