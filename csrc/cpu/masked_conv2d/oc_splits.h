// Threads share an item of work by its output channels where there are fewer items than threads. The results do not
// depend on it, as each of them is computed within one split.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "cpu/masked_conv2d/pattern.h"

namespace sparse_adv {

// Into how many splits `threads` threads cut the output channels of an item, each of which fills an input tile of its
// own.
int64_t count_oc_splits(const BlockCsr& csr, int64_t threads);

// The oc_blocks of one of `splits` nearly equal splits.
Range oc_blocks_of_split(const BlockCsr& csr, int64_t splits, int64_t split);

// The output channels of the oc_blocks of a split.
Range channels_of(const BlockCsr& csr, Range oc_blocks);

}  // namespace sparse_adv
