// Scratch memory of a thread, aligned to a cache line. It grows when more is needed and stays allocated between calls,
// unless it is large.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "common/errors.h"

namespace sparse_adv {

class AlignedBuffer {
 public:
  // Room for `size` floats, uninitialised. More than kKept floats are given back when fewer are needed.
  float* at_least(int64_t size) {
    if (size > size_ || (size_ > kKept && size <= kKept)) {
      data_.reset();
      size_ = 0;  // also if no memory is found below
      constexpr std::size_t kAlignment = 64;
      const std::size_t bytes =
          (static_cast<std::size_t>(size) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
      data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
      check(data_ != nullptr, "there are no ", bytes, " bytes of memory for a thread's intermediate results");
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kKept = 4 << 20;

  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace sparse_adv
