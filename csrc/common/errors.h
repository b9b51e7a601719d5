// How an op refuses its arguments. Kernels and checks throw as usual, but no C++ exception leaves an op library: one
// that does is unwound first by this library's unwinder and then by libtorch's, and where these are two different ones
// (a compiler that links libgcc statically) the process ends. So every exception is caught here, and its text goes to
// aoti_torch_check, a C function of libtorch that throws it again, within libtorch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <sstream>
#include <stdexcept>

namespace sparse_adv {

// What memory safety needs, checked again below Python.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "sparse_adv: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

using BoxedOp = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

constexpr size_t kMessageSize = 1024;

// Whether the op ran to its end; if not, `message` says why.
bool run_caught(BoxedOp op, StableIValue* stack, uint64_t inputs, uint64_t outputs,
                char (&message)[kMessageSize]) noexcept;

// The op as torch's dispatcher calls it. libtorch's exception passes through this frame, which therefore holds nothing
// to destroy: the unwinder only steps over it and calls no code of this library.
template <BoxedOp op>
void throw_in_torch(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  char message[kMessageSize];
  if (!run_caught(op, stack, inputs, outputs, message)) aoti_torch_check(false, "sparse_adv", __FILE__, 0, message);
}

// In place of torch::stable::parallel_for, whose threads belong to libtorch: what `body` throws is thrown here again.
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

// In place of TORCH_BOX.
#define SPARSE_ADV_BOX(function) (&sparse_adv::throw_in_torch<&TORCH_BOX(function)>)
