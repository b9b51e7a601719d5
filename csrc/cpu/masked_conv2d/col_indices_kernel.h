// The entries of a pattern's lists (pattern_layout.h), all at once: on every call, so they must cost little.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

// Whether every entry names one of the channels and taps.
SPARSE_ADV_FOR_EACH_ISA(bool entries_inside(const int32_t* entries, int64_t count, int64_t channels, int64_t taps));

// Whether each three entries from the first on name three neighbouring taps, the first of which starts a row of three.
SPARSE_ADV_FOR_EACH_ISA(bool entries_in_threes(const int32_t* entries, int64_t count));

// offsets[i] = (channel & block_mask) * plane + tap_offset[tap].
SPARSE_ADV_FOR_EACH_ISA(void entry_offsets(const int32_t* entries, int64_t count, int32_t block_mask, int32_t plane,
                                           const int32_t* tap_offset, int32_t* offsets));

}  // namespace sparse_adv
