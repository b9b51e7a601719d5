// Consecutive numbers.
#pragma once

#include <cstdint>

namespace sparse_adv {

struct Range {
  int64_t begin, end;  // [begin, end)
};

}  // namespace sparse_adv
