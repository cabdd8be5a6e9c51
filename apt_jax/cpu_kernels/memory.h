// Memory that begins where a line of the cache does: a vector of AVX-512 that lies across two is loaded at half the speed.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace apt {

constexpr size_t kLine = 64;  // bytes

template <class T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kLine))); }
  void deallocate(T* own, size_t) { ::operator delete(own, std::align_val_t(kLine)); }
  // Numbers are written before they are read: none is set to 0.
  template <class Other>
  void construct(Other* at) {
    ::new (static_cast<void*>(at)) Other;
  }
  template <class Other, class... Args>
  void construct(Other* at, Args&&... args) {
    ::new (static_cast<void*>(at)) Other(std::forward<Args>(args)...);
  }

  bool operator==(const LineAllocator&) const { return true; }
};

template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

// So many float32, whole lines.
inline size_t whole_lines(size_t numbers) {
  constexpr size_t kOfLine = kLine / sizeof(float);
  return (numbers + kOfLine - 1) / kOfLine * kOfLine;
}

// Memory that is kept from call to call: the system would bring fresh memory page by page.
class Scratch {
 public:
  float* of(size_t wanted) {
    if (wanted > numbers_.size()) numbers_ = Aligned<float>(), numbers_ = Aligned<float>(wanted);
    return numbers_.data();
  }

 private:
  Aligned<float> numbers_;
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
