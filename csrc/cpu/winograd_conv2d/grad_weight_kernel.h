// The gradient of the weights by Winograd's filtering: the adjoint of winograd_conv2d/conv_kernel.h.
//
// With the transformed images V and the transformed gradients Z of all tiles, the sums V^T Z of each element are the
// gradient of the transformed weights.
#pragma once

#include <cstdint>

#include "cpu/winograd_conv2d/conv_kernel.h"

namespace sparse_adv {

// Transforms one tile of the images, to v[element * pitch * C + channel], and of the gradients, to
// z[element * pitch * panels * kPanel + channel], where the channels beyond the last one become 0.
SPARSE_ADV_FOR_EACH_ISA(void winograd_grad_tile(const Winograd& conv, const float* input, const float* grad,
                                                int64_t tile, int64_t pitch, float* v, float* z))

// Adds the sum over `tiles` of v[tile][c] z[tile][k] to sums[c][k], or starts it if `is_first`, for the channels
// [begin, end) of one element.
SPARSE_ADV_FOR_EACH_ISA(void winograd_grad_multiply(const Winograd& conv, int64_t tiles, const float* v, const float* z,
                                                    int64_t begin, int64_t end, bool is_first, float* sums))

// Writes the gradient [K][C][3][3] of the input channels [begin, end) from the sums [element][C][panels * kPanel].
SPARSE_ADV_FOR_EACH_ISA(void winograd_grad_taps(const Winograd& conv, const float* sums, int64_t begin, int64_t end,
                                                float* grad_weight))

}  // namespace sparse_adv
