// What `apt_jax/cpu_kernels/threads.h` promises, with pools of our own. The argument names the check; exit 0: it holds.
#include "../../apt_jax/cpu_kernels/threads.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>

namespace {

constexpr double kLarge = 1e9;  // products: worth other threads

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// Runs tasks in threads of its own, in any order.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; i++) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void schedule(apt::Team::Task task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void serve() {
    for (std::unique_lock lock(mutex_);;) {
      changed_.wait(lock, [&] { return ended_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const apt::Team::Task task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<apt::Team::Task> tasks_;
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

// Every piece of every round once, in that round, and seen by the caller when the round is over; plain numbers, so that
// the thread sanitizer finds what is not ordered.
void rounds(int threads, int calls, int rounds_of_call, bool pauses) {
  Pool pool(threads - 1);
  std::vector<int> hits(97);
  for (int call = 0; call < calls; call++) {
    apt::Team team(threads, [&](auto task) { pool.schedule(std::move(task)); });
    for (int round = 0; round < rounds_of_call; round++) {
      const int count = 2 + (call * 31 + round * 7) % 96;
      std::fill(hits.begin(), hits.end(), 0);
      team.run(count, kLarge, [&, round](int i) { hits[i] += round + 1; });
      for (int i = 0; i < int(hits.size()); i++)
        require(hits[i] == (i < count ? round + 1 : 0), "a piece was done not once, or in another round");
      if (pauses && round % 16 == 0) std::this_thread::sleep_for(2 * apt::kSpin);  // helpers fall asleep
    }
  }
}

// A pool may run a task at once in the thread that brings it.
void inlined() {
  apt::Team team(4, [](auto task) { task(); });
  int sum = 0;
  team.run(10, kLarge, [&](int i) { sum += i; });
  require(sum == 45, "not all pieces were done");
}

// It may also run it when the call has returned.
void late() {
  std::vector<apt::Team::Task> tasks;
  std::atomic<int> sum{0};
  {
    apt::Team team(4, [&](auto task) { tasks.push_back(std::move(task)); });
    team.run(10, kLarge, [&](int i) { sum += i; });
    require(sum == 45 && tasks.size() == 3, "the caller alone did not do all");
  }
  for (auto& task : tasks) std::thread(task).join();
  require(sum == 45, "a piece was done after the end");
}

// Threads without work take no processor from others: here a round of one long piece, and a pause between rounds.
void asleep() {
  using std::chrono::milliseconds;
  Pool pool(7);
  apt::Team team(8, [&](auto task) { pool.schedule(std::move(task)); });
  const auto one_is_long = [](int i) { std::this_thread::sleep_for(milliseconds(i ? 1 : 300)); };
  team.run(8, kLarge, one_is_long);
  std::this_thread::sleep_for(milliseconds(300));
  team.run(8, kLarge, one_is_long);
  const double seconds = double(std::clock()) / CLOCKS_PER_SEC;
  std::fprintf(stderr, "%.3f s of processor time in 0.9 s without work\n", seconds);
  require(seconds < 0.1, "waiting threads spin");
}

}  // namespace

int main(int, char** arguments) {
  const char* check = arguments[1];
  if (!std::strcmp(check, "rounds")) rounds(16, 100, 200, false);
  if (!std::strcmp(check, "rounds with pauses")) rounds(6, 10, 100, true);
  if (!std::strcmp(check, "inlined")) inlined();
  if (!std::strcmp(check, "late")) late();
  if (!std::strcmp(check, "asleep")) asleep();
}
