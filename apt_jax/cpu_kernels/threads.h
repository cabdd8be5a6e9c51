// Work shared between the calling thread and XLA's own pool: no threads of our own that would compete with them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace apt {

// Runs work(0) ... work(count - 1) in any order and returns when all are done. The caller takes part, so it ends even
// if no other thread is free; a thread that comes too late finds nothing left.
template <class Work>
void in_parallel(xla::ffi::ThreadPool& pool, int count, const Work& work) {
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
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int threads = static_cast<int>(pool.num_threads());
  for (int i = 1; i < threads && i < count; i++) pool.Schedule(std::function<void()>(help));
  help();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace apt
