// Large memory that is written once. Fresh pages of 4 KiB cost more than what is computed into them; Linux hands out 2
// MiB at a time where it is asked to.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace upsnet {

constexpr uintptr_t large_page = uintptr_t(1) << 21;

// Asks for large pages behind the whole ones among these bytes. Advice only: without it all stays as it is.
inline void advise_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (uintptr_t(data) + large_page - 1) / large_page * large_page;
  const uintptr_t last = (uintptr_t(data) + bytes) / large_page * large_page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Zeros, aligned to a cache line; pages that nobody touches take no memory.
template <class T>
class Zeros {
 public:
  explicit Zeros(int64_t count) : bytes_(size_t(count) * sizeof(T) + 64) {
    if (bytes_ < 2 * large_page) {
      data_ = std::calloc(bytes_, 1);
      if (data_ == nullptr) throw std::bad_alloc();
    } else {
      data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data_ == MAP_FAILED) throw std::bad_alloc();
      advise_large_pages(data_, bytes_);
    }
  }
  Zeros(Zeros&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  Zeros& operator=(Zeros&&) = delete;
  ~Zeros() {
    if (bytes_ < 2 * large_page) std::free(data_);
    else if (data_ != nullptr) munmap(data_, bytes_);
  }
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_) + 63) / 64 * 64); }

 private:
  size_t bytes_;
  void* data_;
};

}  // namespace upsnet
