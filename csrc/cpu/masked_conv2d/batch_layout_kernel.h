// Between images as PyTorch stores them and the layout that the kernels compute in: lane = sample, and per channel one
// plane of vectors that already holds the padding (a "window" of the images).
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/masked_conv2d/conv_kernel.h"

namespace sparse_adv {

// Up to kLanes images, NCHW or channels_last without gaps.
struct Images {
  const float* data;   // the first of these images
  int64_t image_size;  // from one image to the next
  int64_t channels, pixels;
  bool channels_last;
  int count;  // lanes that hold an image; the others are 0
};

// Where the pixels first_pixel .. first_pixel + pixel_count - 1 of each channel go: to vector place[i] of the channel's
// plane, or nowhere if that is negative. The vectors named by `gaps` become 0.
struct Placement {
  int64_t first_pixel, pixel_count;
  const int32_t* place;
  const int32_t* gaps;
  int64_t gap_count;
  int64_t plane;   // vectors from one channel to the next
  bool ascending;  // place ascends from pixel to pixel, as it does at unit stride if no pixel is left out
};

// Computed planes of vectors, one per output channel: channel k's is plane number plane_of[k].
struct Sums {
  const float* data;
  const int32_t* plane_of;
  int64_t plane;                     // vectors from one plane to the next
  int64_t first_pixel, pixel_count;  // of the output, to be written
  const int32_t* place;              // of each of these pixels in a plane
};

SPARSE_ADV_FOR_EACH_ISA(int lane_count());
SPARSE_ADV_FOR_EACH_ISA(void fill_window(const Images& images, const Placement& placement, int64_t first_channel,
                                         int64_t last_channel, float* window));
SPARSE_ADV_FOR_EACH_ISA(void store_sums(const Sums& sums, const Epilogue& epilogue, const Images& shape,
                                        float* output));

}  // namespace sparse_adv
