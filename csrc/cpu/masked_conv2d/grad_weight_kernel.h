// The arithmetic of grad_weight: one tile of output pixels, all kept weights.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/masked_conv2d/conv_kernel.h"

namespace sparse_adv {

// grad has one plane of `grad_plane` floats per output channel, no padding.
struct GradWeightTile {
  const float* window;                                   // at the tile's first vector
  const float* grad;                                     // at the tile's first vector
  int64_t window_row_pitch, grad_row_pitch, grad_plane;  // in floats
  int tile_cols;
  const int32_t* channel_of;  // [vectors * vector]: the output channel of each row of a vector, -1 beyond the last
};

// totals[entry * vector + j] += sum over the tile's vectors and their lanes of window * grad, for the entries of the
// segments from `first_segment` on.
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_grad_weight_tile(const OffsetLists& lists, int64_t first_segment,
                                                            int64_t last_segment, const GradWeightTile& tile,
                                                            float* totals));

}  // namespace sparse_adv
