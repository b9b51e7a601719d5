// Between images as PyTorch stores them and the layout that the kernels compute in: lane = sample, and per channel one
// plane of vectors that already holds the padding (a "window" of the images).
#pragma once

#include <cstdint>

#include "cpu/capability.h"

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

// What follows the sum: out = relu(scale[k] * sum + bias[k] + residual). Null pointers leave their part out.
struct Epilogue {
  const float* scale;
  const float* bias;
  const float* residual;  // laid out as the output
  bool relu;
};

// Consecutive vectors of a computed plane, `from` on, that go to the output pixels to, to + step, ...
struct Run {
  int32_t from, to, count;
};

// Computed planes of vectors, one per output channel: channel k's is plane number plane_of[k].
struct Sums {
  const float* data;
  const int32_t* plane_of;
  int64_t plane;  // vectors from one plane to the next
  const Run* runs;
  int64_t run_count;
  int32_t step;
};

SPARSE_ADV_FOR_EACH_ISA(int lane_count());
SPARSE_ADV_FOR_EACH_ISA(void fill_window(const Images& images, const Placement& placement, int64_t first_channel,
                                         int64_t last_channel, float* window));
SPARSE_ADV_FOR_EACH_ISA(void store_sums(const Sums& sums, const Epilogue& epilogue, const Images& shape,
                                        float* output));

}  // namespace sparse_adv
