// Checks and conversions of all column indices of a pattern (pattern_layout.h). They run on every call, so they are
// vectorised.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "cpu/capability.h"

namespace sparse_adv {

// Whether every column index names one of the `channels` and one of the `taps`.
SPARSE_ADV_FOR_EACH_ISA(bool col_indices_inside(const int32_t* col_indices, int64_t count, int64_t channels,
                                                int64_t taps));

// Whether every three consecutive column indices name the three taps of a filter row, in their order.
SPARSE_ADV_FOR_EACH_ISA(bool col_indices_in_triples(const int32_t* col_indices, int64_t count));

// Where the column indices of each filter row begin, for these rows of the matrix:
// starts[row * (filter_rows + 1) + r], counted from the row's start. Returns whether they are sorted by filter row.
SPARSE_ADV_FOR_EACH_ISA(bool find_filter_rows(const int32_t* col_indices, const int32_t* row_offsets, Range rows,
                                              int64_t filter_rows, int64_t filter_cols, int32_t* starts));

// offsets[i] = (channel & slice_mask) * channel_pitch + tap_offset[tap].
SPARSE_ADV_FOR_EACH_ISA(void col_indices_to_offsets(const int32_t* col_indices, int64_t count, int32_t slice_mask,
                                                    int32_t channel_pitch, const int32_t* tap_offset,
                                                    int32_t* offsets));

}  // namespace sparse_adv
