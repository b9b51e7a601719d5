// Dense 3 x 3 convolutions with stride 1 by Winograd's minimal filtering (Lavin and Gray 2016, sections 3 and 4).
//
// A tile of m x m output pixels needs (m + 2)^2 input pixels. In the transformed domain a convolution is a product of
// matrices for each of the (m + 2)^2 elements: 36 multiplications per channel pair for 4 x 4 pixels in place of 144.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/epilogue.h"
#include "cpu/winograd_conv2d/winograd_weight.h"

namespace sparse_adv {

// Weights are stored in panels of this many output channels: [element][panel][in_channels][kPanel]. The channels beyond
// the last one are zeros.
constexpr int64_t kPanel = 32;

// All tensors are channels_last without gaps. The output may be some of the channels of a wider tensor: the kernels get
// a pointer to the first of them.
struct Winograd {
  int64_t tile;                  // m, 2 or 4
  int64_t H, W, C;               // of the input
  int64_t P, Q, K;               // of the output
  int64_t pixel_stride;          // of the output: channels from a pixel to the next, K or more
  int64_t pad_rows, pad_cols;    // zeros above and left of the input
  int64_t tile_rows, tile_cols;  // tiles of an image
  int64_t panels;                // of output channels
};

// Computes the tiles [begin, end), counted over all images, with an epilogue; `scratch` has room for them.
SPARSE_ADV_FOR_EACH_ISA(void winograd_tiles(const Winograd& conv, const float* input, const float* weight, float* out,
                                            const Epilogue<float>& epilogue, int64_t begin, int64_t end,
                                            float* scratch))

// Transforms the weights of the input channels [begin, end) of a panel; `out` is the whole result.
SPARSE_ADV_FOR_EACH_ISA(void winograd_weight(const WinogradWeight& weight, int64_t tile, int64_t panel, int64_t begin,
                                             int64_t end, float* out))

}  // namespace sparse_adv
