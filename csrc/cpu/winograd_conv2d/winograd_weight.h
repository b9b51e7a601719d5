// How the transformations of weights find the filters of a convolution.
#pragma once

#include <cstdint>

namespace sparse_adv {

// Where a transformation finds w[out][in][row][col]; for the gradient of the input the roles of the channels are
// exchanged and the taps are turned by 180 degrees, which negative strides express.
struct WinogradWeight {
  const float* first;  // the tap [0][0] of the first pair of channels
  int64_t out_stride, in_stride, row_stride, col_stride;
  int64_t out_channels, in_channels;
};

}  // namespace sparse_adv
