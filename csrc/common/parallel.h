// Loops of several threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace sparse_adv {

// Elements per thread at least, of loops with a few operations for each, as in ATen's elementwise kernels.
constexpr int64_t kElementwiseGrain = 32768;

// Replaces torch::stable::parallel_for, whose threads belong to libtorch: rethrows on the calling thread what `body`
// threw on any thread (errors.h says why).
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t part_begin, int64_t part_end) noexcept {
    try {
      body(part_begin, part_end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace sparse_adv
