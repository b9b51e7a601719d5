// Scratch memory of a thread, aligned to a cache line. It grows when more is needed and stays allocated between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparse_adv {

class AlignedBuffer {
 public:
  // Room for `size` floats, uninitialised.
  float* at_least(int64_t size) {
    if (size > size_) {
      data_.reset();
      constexpr std::size_t kAlignment = 64;
      const std::size_t bytes =
          (static_cast<std::size_t>(size) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
      data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace sparse_adv
