// Work shared between the calling thread and XLA's own pool: no threads of our own that would compete with them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace apt {

constexpr int kSpins = 10'000;  // some 100 us: shorter than to sleep and be woken

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

constexpr double kSmall = 1e6;  // products: to wake another thread takes longer

// Runs work(0) ... work(count - 1) in any order and returns when all are done. The caller takes part, so it ends even
// if no other thread is free; a thread that comes too late finds nothing left. `size` is about how many products (or
// numbers moved) all of it takes.
template <class Work>
void in_parallel(xla::ffi::ThreadPool& pool, int count, double size, const Work& work) {
  if (size < kSmall || count < 2) {
    for (int i = 0; i < count; i++) work(i);
    return;
  }
  struct State {
    std::atomic<int> next{0}, done{0};
    int count;
    std::function<void(int)> work;
  };
  const auto state = std::make_shared<State>();
  state->count = count;
  state->work = std::ref(work);
  const auto help = [state] {
    for (int i; (i = state->next.fetch_add(1)) < state->count;) {
      state->work(i);
      if (state->done.fetch_add(1, std::memory_order_acq_rel) + 1 == state->count) state->done.notify_all();
    }
  };
  const int threads = static_cast<int>(pool.num_threads());
  for (int i = 1; i < threads && i < count; i++) pool.Schedule(std::function<void()>(help));
  help();
  for (int i = 0, done; (done = state->done.load(std::memory_order_acquire)) < count; i++)
    if (i < kSpins)
      pause();
    else
      state->done.wait(done);  // no core is free for the others
}

// Memory of a thread for one call at a time, which it keeps: the system would bring fresh memory page by page.
struct Scratch {
  std::unique_ptr<float[]> numbers;
  size_t size = 0;

  float* of(size_t wanted) {
    if (wanted > size) numbers.reset(new float[wanted]), size = wanted;
    return numbers.get();
  }
};

}  // namespace apt
