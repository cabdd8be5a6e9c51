// Iterations that one call from the host runs one after the other. The host gets the results of each, and gives what the
// next one works on meanwhile, or else that was the last.
#pragma once

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace apt {

// Between the device's thread and the host's. The host gives the input of an iteration only after it has taken the
// results of the one two before, so two places are enough for either.
class Relay {
 public:
  // Args: `grace_s`, how long the device waits for a host that is late.
  Relay(size_t input_bytes, size_t result_bytes, double grace_s) : grace_(grace_s) {
    for (Place& place : places_) place.input.resize(input_bytes), place.results.resize(result_bytes);
  }

  // Host: gives the input of the next iteration; false if the call has ended.
  template <class Write>
  bool give(const Write& write) {
    const std::lock_guard lock(mutex_);
    if (ended_) return false;
    write(at(given_++).input);
    changed_.notify_all();
    return true;
  }

  // Host: nothing more will be given.
  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

  // Host: waits until an iteration has ended, or for `seconds`; its results, or nullptr.
  const char* wait(int iteration, double seconds) {
    std::unique_lock lock(mutex_);
    const auto has_ended = [&] { return done_ > iteration; };
    const bool ready = changed_.wait_for(lock, std::chrono::duration<double>(seconds), has_ended);
    return ready ? at(iteration).results.data() : nullptr;
  }

  // Device: an iteration has ended, `write(results)` writes what it gives; if another one follows, `read(input)` reads
  // what that works on.
  template <class Write, class Read>
  bool hand_over(const Write& write, const Read& read) {
    write(at(done_).results);  // only this thread changes `done_`
    {
      std::unique_lock lock(mutex_);
      done_++;
      changed_.notify_all();
      changed_.wait_for(lock, grace_, [&] { return done_ < given_ || ended_; });
      if (done_ == given_) {
        ended_ = true;
        return false;
      }
    }
    read(at(done_).input);
    return true;
  }

 private:
  struct Place {
    std::vector<char> input, results;
  };

  Place& at(int iteration) { return places_[iteration % 2]; }

  const std::chrono::duration<double> grace_;
  Place places_[2];
  std::mutex mutex_;
  std::condition_variable changed_;
  int given_ = 1, done_ = 0;  // iterations; the first one's input came with the call
  bool ended_ = false;
};

// All that are open, by number: a call may still run when the host has given up on it.
class Relays {
 public:
  int open(size_t input_bytes, size_t result_bytes, double grace_s) {
    const std::lock_guard lock(mutex_);
    open_[++last_] = std::make_shared<Relay>(input_bytes, result_bytes, grace_s);
    return last_;
  }

  void close(int number) {
    if (const auto own = find(number)) own->end();
    const std::lock_guard lock(mutex_);
    open_.erase(number);
  }

  std::shared_ptr<Relay> find(int number) {
    const std::lock_guard lock(mutex_);
    const auto found = open_.find(number);
    return found == open_.end() ? nullptr : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::shared_ptr<Relay>> open_;
  int last_ = 0;
};

}  // namespace apt
