// Scratch memory of a thread, aligned to a cache line. It stays allocated between calls unless it is large.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#include "common/errors.h"

namespace sparse_adv {

class AlignedBuffer {
 public:
  // Room for `size` floats, uninitialised. What an earlier call of at_least returned becomes invalid if it was smaller.
  float* at_least(int64_t size) {
    if (size > size_) {
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

  // Only one of the functions that are running on a thread may use a buffer: it would overwrite the other one's values.
  void take() { check(!std::exchange(taken_, true), "a thread's intermediate results are needed by two functions"); }

  void give_back() {
    taken_ = false;
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  // 32 MB per thread and buffer: as much as winograd_conv2d takes for its tiles of 512 input and 512 output channels.
  // If they were given back, the system would clear their pages in each call. Only extreme sizes take more, such as
  // rows of thousands of pixels.
  static constexpr int64_t kKept = 8 << 20;

  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
  bool taken_ = false;
};

// A call's use of a buffer of its thread. At the end of the call, also by an exception, a large buffer is given back.
class ScratchUse {
 public:
  // The buffer that all kernels share, of which a thread runs one at a time.
  ScratchUse() : ScratchUse(shared()) {}
  // Another one, for what lasts while kernels run.
  explicit ScratchUse(AlignedBuffer& buffer) : buffer_(buffer) { buffer_.take(); }
  ~ScratchUse() { buffer_.give_back(); }
  ScratchUse(const ScratchUse&) = delete;
  ScratchUse& operator=(const ScratchUse&) = delete;

  float* at_least(int64_t size) { return buffer_.at_least(size); }

 private:
  static AlignedBuffer& shared() {
    thread_local AlignedBuffer buffer;
    return buffer;
  }

  AlignedBuffer& buffer_;
};

}  // namespace sparse_adv
