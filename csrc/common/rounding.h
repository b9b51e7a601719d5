// Division and multiples, rounded up.
#pragma once

#include <cstdint>

namespace sparse_adv {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t size, int64_t multiple) { return divide_up(size, multiple) * multiple; }

}  // namespace sparse_adv
