// Between images as PyTorch stores them and the batch-vectorised layout: each vector has one pixel of kLanes images,
// and each channel has a plane of vectors, padding included.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "cpu/capability.h"
#include "cpu/masked_conv2d/conv_kernel.h"

namespace sparse_adv {

// Up to kLanes images, NCHW or channels_last without gaps.
struct Images {
  const float* data;   // of the first of these images
  int64_t image_size;  // floats from one image to the next
  int64_t channels, pixels;
  bool channels_last;
  int count;  // lanes that have an image; the others are 0
};

// Which vector of a channel's plane each pixel goes to: pixel first_pixel + i to vector positions[i], or nowhere if
// that is negative. The vectors in `zero_positions` become 0.
struct PixelMap {
  int64_t first_pixel, pixel_count;
  const int32_t* positions;
  const int32_t* zero_positions;
  int64_t zero_count;
  int64_t channel_pitch;  // vectors from one channel to the next
  bool ascending;         // positions ascend, as they do at unit stride if no pixel is left out
};

// Computed planes of vectors, one per output channel: that of channel k is plane number plane_of[k].
struct Accumulators {
  const float* data;
  const int32_t* plane_of;
  int64_t channel_pitch;             // vectors from one plane to the next
  int64_t first_pixel, pixel_count;  // of the output, to be written
  const int32_t* positions;          // of each of these pixels in a plane
  Range channels;                    // to be written; from and to multiples of kLanes, but for the end
};

SPARSE_ADV_FOR_EACH_ISA(int lane_count());
// Channel c goes to tile + (c - channels.begin) * channel_pitch vectors.
SPARSE_ADV_FOR_EACH_ISA(void fill_batch_tile(const Images& images, const PixelMap& map, Range channels, float* tile));
// `output` describes the images that are written to `data`; residual and gates start at the first of them. The pixels
// are whole rows of the gates.
SPARSE_ADV_FOR_EACH_ISA(void store_accumulators(const Accumulators& accumulators, const Epilogue<float>& epilogue,
                                                const Images& output, float* data));

}  // namespace sparse_adv
