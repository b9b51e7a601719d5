// The transformation of live filters, U = G g G^T.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/masked_winograd_conv2d/live_filters.h"
#include "cpu/winograd_conv2d/winograd_weight.h"

namespace sparse_adv {

// Weights with their mask; weights that it does not keep count as 0.
struct MaskedFilters {
  WinogradWeight weight;
  const uint8_t* mask;  // of the tap [0][0] of the first filter
  int64_t out_stride, in_stride, tap_stride;
};

// Transforms the live filters [begin, end) to their places in `values`; rows[i] is the row of filter i.
SPARSE_ADV_FOR_EACH_ISA(void masked_winograd_weight(const MaskedFilters& source, const LiveFilters& filters,
                                                    const int32_t* rows, int64_t begin, int64_t end, float* values))

}  // namespace sparse_adv
