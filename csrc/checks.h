// What memory safety needs, checked again below Python. A C++ exception keeps its text only until the first call into
// torch's stable ABI is on the stack, so ops check before they allocate or start threads.
#pragma once

#include <sstream>
#include <stdexcept>

namespace sparse_adv {

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "sparse_adv: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace sparse_adv
