// The size of the L2 cache, which decides how kernels cut their work.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace sparse_adv {

// Of one core, within the sizes that the kernels were tuned for.
inline int64_t l2_bytes() {
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 19, 2 << 20);
  return bytes;
}

}  // namespace sparse_adv
