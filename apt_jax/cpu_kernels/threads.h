// Work shared between the calling thread and those of XLA's pool: no threads of our own that would compete with them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace apt {

constexpr std::chrono::microseconds kSpin(100);  // about what it takes to sleep and be woken
constexpr double kSmall = 2e5;                   // products: another thread takes as long to notice

// Where threads wait for something that another one brings about soon: they spin, and sleep if it takes longer, so that
// a core goes to a thread with work when there are fewer cores than threads.
class Waiting {
 public:
  // Returns when `ready()`, which reads an atomic. Whoever makes it true stores that with memory_order_seq_cst, then
  // calls `wake`. No wake-up is lost: of the two pairs "store, then read sleeping_" here and "add to sleeping_, then read
  // ready()" there, all sequentially consistent, one of the reads sees the other's store. A sleeper holds the mutex from
  // that read on until it sleeps.
  template <class Ready>
  void until(const Ready& ready) {
    if (spin(ready)) return;
    sleeping_.fetch_add(1);
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, ready);
    }
    sleeping_.fetch_sub(1);
  }

  void wake() {
    if (!sleeping_.load()) return;
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

 private:
  template <class Ready>
  static bool spin(const Ready& ready) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + kSpin;
    do
      for (int i = 0; i < 32; i++) {
        if (ready()) return true;
        pause();
      }
    while (Clock::now() < end);
    return false;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// The threads that work for one call from XLA. Threads of the pool are started once, when there first is work for them,
// and look for more until the call returns: waking them for each product would take as long as a small product.
//
// Args: `threads`, how many may work, the caller included; `schedule(task)`, which has the pool run a task some time, in
// any thread: also at once in the caller, or when the call has long returned.
class Team {
 public:
  using Task = std::function<void()>;

  Team(int threads, std::function<void(Task)> schedule)
      : threads_(threads), schedule_(std::move(schedule)), state_(std::make_shared<State>()) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() { state_->begin(kEnded); }

  int threads() const { return threads_; }

  // Runs work(0) ... work(count - 1) in any order and returns when all are done. The caller takes part, so it ends even
  // if no other thread is free; a thread that comes too late finds nothing left. `size` is about how many products (or
  // numbers moved) all of it takes.
  template <class Work>
  void run(int count, double size, const Work& work) {
    run(count, size, &work, [](const void* work, int i) { (*static_cast<const Work*>(work))(i); });
  }

 private:
  using Call = void (*)(const void*, int);

  static constexpr int kEnded = -1;

  void run(int count, double size, const void* work, Call call) {
    if (size < kSmall || count < 2 || threads_ < 2) {
      for (int i = 0; i < count; i++) call(work, i);
      return;
    }
    State& state = *state_;
    state.call = call, state.work = work, state.count = count;
    state.done.store(0, std::memory_order_relaxed);
    state.begin(count);
    for (; helpers_ < threads_ - 1 && helpers_ < count - 1; helpers_++)
      schedule_([state = state_] {
        if (std::this_thread::get_id() != state->caller) state->help();
      });
    while (state.take()) {
    }
    state.finished.until([&] { return state.done.load() == count; });
  }

  // A round of work, and the order of memory in it.
  //
  // `left` counts down the pieces that nobody has taken; a piece belongs to the thread whose compare-exchange took one
  // off. That thread reads nothing of the round before, and what it compares with is the whole state, so it does not
  // matter how old the value is that it began with, or whether `left` had it in another round meanwhile (ABA): if the
  // exchange succeeds, a piece of the present round is left and is now its own.
  //   The exchange acquires; what it read was written by `begin` of this round or, through a chain of exchanges, comes
  // from that (a release sequence). So the caller's writes of call, work and count happen before their reads.
  //   The piece's `done.fetch_add` releases and the caller, which waits for all of them, acquires: all that was done, and
  // the reads of call, work and count, happen before `run` returns and before they are written for the next round. So
  // these need not be atomic. Until then the round cannot end, since a piece that was taken is not done.
  //   A thread that comes late, in a later round or when the team has ended, sees what is left then, or nothing. State is
  // shared, so it is there as long as any thread may look.
  struct State {
    alignas(64) std::atomic<int> left{0};  // kEnded: there will be no more
    alignas(64) std::atomic<int> done{0};
    alignas(64) int count = 0;
    const void* work = nullptr;
    Call call = nullptr;
    const std::thread::id caller = std::this_thread::get_id();
    Waiting started, finished;

    void begin(int pieces) {
      left.store(pieces);  // sequentially consistent, for `started`
      started.wake();
    }

    // Does a piece of work; false if none is left.
    bool take() {
      int own = left.load(std::memory_order_relaxed);
      do {
        if (own <= 0) return false;
      } while (!left.compare_exchange_weak(own, own - 1, std::memory_order_acquire, std::memory_order_relaxed));
      const int all = count;
      call(work, all - own);
      if (done.fetch_add(1) + 1 == all) finished.wake();
      return true;
    }

    void help() {
      while (left.load() != kEnded)
        if (!take()) started.until([&] { return left.load() != 0; });
    }
  };

  const int threads_;
  const std::function<void(Task)> schedule_;
  const std::shared_ptr<State> state_;
  int helpers_ = 0;
};

}  // namespace apt
