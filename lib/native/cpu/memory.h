// Scratch memory of the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace upsnet {

// Zeros, aligned to a cache line. Large pages are not asked for: where memory is in pieces, to find them takes longer
// than to compute what goes into them.
template <class T>
class Zeros {
 public:
  explicit Zeros(int64_t count) : data_(std::calloc(size_t(count) * sizeof(T) + 64, 1)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Zeros(Zeros&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  Zeros& operator=(Zeros&&) = delete;
  ~Zeros() { std::free(data_); }
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_) + 63) / 64 * 64); }

 private:
  void* data_;
};

}  // namespace upsnet
