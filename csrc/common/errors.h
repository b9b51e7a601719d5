// How an op reports errors. Kernels and checks throw as usual, but no C++ exception may leave an op library. It would
// be unwound first by this library's unwinder and then by libtorch's; where these are two different ones (a compiler
// that links libgcc statically), the process is terminated. So every exception is caught here, and its text is passed
// to aoti_torch_check, a C function of libtorch that throws it again inside libtorch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>

namespace sparse_adv {

// Throws std::runtime_error with the parts as text, unless the condition is true. The ops check again what memory
// safety needs, although the Python functions have checked it.
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

// Runs the op. Returns false and sets `message` if it threw.
bool run_caught(BoxedOp op, StableIValue* stack, uint64_t inputs, uint64_t outputs,
                char (&message)[kMessageSize]) noexcept;

// The op as torch's dispatcher calls it. libtorch's exception passes through this stack frame. The frame has no objects
// to destroy, so the unwinder does not call code of this library.
template <BoxedOp op>
void throw_in_torch(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  char message[kMessageSize];
  if (!run_caught(op, stack, inputs, outputs, message)) aoti_torch_check(false, "sparse_adv", __FILE__, 0, message);
}

}  // namespace sparse_adv

// Replaces TORCH_BOX.
#define SPARSE_ADV_BOX(function) (&sparse_adv::throw_in_torch<&TORCH_BOX(function)>)
