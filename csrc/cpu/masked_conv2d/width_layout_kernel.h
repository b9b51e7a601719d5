// From NCHW images to windows in which lane = pixel: the rows of one image, padded. Nothing is transposed.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

// Rows first_row .. first_row + row_count - 1 of each channel become rows row_at ... of the window. All in floats.
struct RowPlacement {
  int64_t row_size;  // of the images
  int64_t first_row, row_count, row_at;
  int64_t rows;          // of the window: those that hold no row of the image become 0
  int64_t data;          // written of each row, 0 beyond row_size: a multiple of kLanes
  int64_t pitch, plane;  // from one row, one channel to the next
};

// Channel c of an image, of `pixels` floats each, goes to window + (c - first_channel) * plane.
SPARSE_ADV_FOR_EACH_ISA(void fill_rows(const float* image, int64_t pixels, const RowPlacement& placement,
                                       int64_t first_channel, int64_t last_channel, float* window));

}  // namespace sparse_adv
