#include "common/errors.h"

#include <dlfcn.h>
#include <unwind.h>

#include <cstring>

namespace sparse_adv {

namespace {

// What the last call of this thread into torch failed with. Null before torch 2.13: the libraries are built for the ABI
// of torch 2.10, so the function is looked up.
const char* error_in_torch() {
  using Text = const char* (*)();
  const auto text = reinterpret_cast<Text>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return text ? text() : nullptr;
}

}  // namespace

bool run_caught(BoxedOp op, StableIValue* stack, uint64_t inputs, uint64_t outputs,
                char (&message)[kMessageSize]) noexcept {
  const auto set_message = [&message](const char* what) {
    std::strncpy(message, what, kMessageSize - 1);
    message[kMessageSize - 1] = '\0';
  };
  try {
    op(stack, inputs, outputs);
    return true;
  } catch (const std::exception& error) {
    // TORCH_ERROR_CODE_CHECK throws the source text of the call alone.
    const char* const what = std::strstr(error.what(), "API call failed") ? error_in_torch() : nullptr;
    set_message(what && *what ? what : error.what());
  } catch (...) {
    set_message("sparse_adv: an exception that is not a std::exception");
  }
  return false;
}

}  // namespace sparse_adv

// Whether this library contains an unwinder of its own (libgcc linked statically), in addition to the one that libtorch
// uses. sparse_adv/ops/_library.py calls this when it loads the library.
extern "C" [[gnu::visibility("default")]] int sparse_adv_has_own_unwinder() {
  Dl_info library{}, unwinder{};
  return dladdr(reinterpret_cast<void*>(&sparse_adv_has_own_unwinder), &library) != 0 &&
         dladdr(reinterpret_cast<void*>(&_Unwind_RaiseException), &unwinder) != 0 &&
         library.dli_fbase == unwinder.dli_fbase;
}
