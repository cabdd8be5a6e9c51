// Work shared between the calling thread and XLA's own pool: no threads of our own that would compete with them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace apt {

constexpr int kSpins = 10'000;  // some 100 us: shorter than to sleep and be woken
constexpr double kSmall = 2e5;  // products: another thread takes as long to notice

inline void wait_a_little(int& waited) {
  if (++waited > kSpins) {
    std::this_thread::yield();  // no core is free for the others
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The threads that work for one call from XLA. Threads of the pool are started once, when there first is work for them, and
// look for more until the call returns: waking them for each product would take as long as a small product.
class Team {
 public:
  explicit Team(xla::ffi::ThreadPool& pool) : pool_(pool), state_(std::make_shared<State>()) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() { state_->ended.store(true, std::memory_order_release); }

  int threads() const { return static_cast<int>(pool_.num_threads()); }

  // Runs work(0) ... work(count - 1) in any order and returns when all are done. The caller takes part, so it ends even
  // if no other thread is free; a thread that comes too late finds nothing left. `size` is about how many products (or
  // numbers moved) all of it takes.
  template <class Work>
  void run(int count, double size, const Work& work) {
    run(count, size, &work, [](const void* work, int i) { (*static_cast<const Work*>(work))(i); });
  }

 private:
  using Call = void (*)(const void*, int);

  void run(int count, double size, const void* work, Call call) {
    if (size < kSmall || count < 2 || threads() < 2) {
      for (int i = 0; i < count; i++) call(work, i);
      return;
    }
    State& state = *state_;
    state.call.store(call, std::memory_order_relaxed);
    state.work.store(work, std::memory_order_relaxed);
    state.count.store(count, std::memory_order_relaxed);
    state.done.store(0, std::memory_order_relaxed);
    const uint64_t round = ++rounds_ << 32;
    state.next.store(round, std::memory_order_release);
    for (; invited_ < threads() - 1; invited_++) pool_.Schedule([state = state_] { help(*state); });
    while (state.take()) {
    }
    for (int waited = 0; state.done.load(std::memory_order_acquire) < count;) wait_a_little(waited);
    state.next.store(round | kNothing, std::memory_order_relaxed);  // before any of the above changes
  }

  static constexpr uint64_t kNothing = 0xffffffff;

  struct State {
    std::atomic<uint64_t> next{kNothing};  // number of the round and of its next piece of work
    std::atomic<int> count{0}, done{0};
    std::atomic<const void*> work{nullptr};
    std::atomic<Call> call{nullptr};
    std::atomic<bool> ended{false};

    // Does the next piece of work; false if there is none. Who has taken one keeps its round from ending, so that what
    // is read of it after that is of this round.
    bool take() {
      uint64_t own = next.load(std::memory_order_acquire);
      do {
        if ((own & kNothing) >= uint64_t(count.load(std::memory_order_relaxed))) return false;
      } while (!next.compare_exchange_weak(own, own + 1, std::memory_order_acq_rel, std::memory_order_acquire));
      call.load(std::memory_order_relaxed)(work.load(std::memory_order_relaxed), int(own & kNothing));
      done.fetch_add(1, std::memory_order_release);
      return true;
    }
  };

  static void help(State& state) {
    for (int waited = 0; !state.ended.load(std::memory_order_acquire);)
      if (state.take())
        waited = 0;
      else
        wait_a_little(waited);
  }

  xla::ffi::ThreadPool& pool_;
  std::shared_ptr<State> state_;
  uint64_t rounds_ = 0;
  int invited_ = 0;
};

// Memory that is kept from call to call: the system would bring fresh memory page by page.
struct Scratch {
  std::unique_ptr<float[]> numbers;
  size_t size = 0;

  float* of(size_t wanted) {
    if (wanted > size) numbers.reset(new float[wanted]), size = wanted;
    return numbers.get();
  }
};

// One that no other call has meanwhile, whichever threads they run on.
class Borrowed {
 public:
  Borrowed() {
    const std::lock_guard lock(mutex());
    if (!free().empty()) own_ = std::move(free().back()), free().pop_back();
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    const std::lock_guard lock(mutex());
    free().push_back(std::move(own_));
  }

  float* of(size_t wanted) { return own_.of(wanted); }

 private:
  static std::mutex& mutex() {
    static std::mutex own;
    return own;
  }
  static std::vector<Scratch>& free() {
    static std::vector<Scratch> own;
    return own;
  }

  Scratch own_;
};

}  // namespace apt
