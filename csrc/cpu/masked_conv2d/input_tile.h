// Fills the tiles that the kernels read, in the scratch memory of a thread: a band of the images with its padding and
// halo, and the same band of grad_output without them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/range.h"
#include "cpu/masked_conv2d/batch_layout_kernel.h"
#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/width_layout_kernel.h"

namespace sparse_adv {

// The images of a work item, from a tensor in a plain layout.
Images images_of(const torch::stable::Tensor& tensor, const Blocking& blocking, int64_t work_item);

class InputTileLoader {
 public:
  explicit InputTileLoader(const Blocking& blocking) : blocking_(blocking) {}

  void start_band(int64_t band, const Images& images);
  // The slice of channels that starts at `first_channel`. The first one has as many channels as any later one.
  // Width-vectorised, what lies between the rows and between the channels is left as it is (Blocking::has_gaps).
  void fill(int64_t first_channel, float* tile) const;

 private:
  void map_pixels(int64_t band);
  void map_rows(int64_t band);

  const Blocking& blocking_;
  Images images_{};
  PixelMap pixel_map_{};  // batch-vectorised; points into the two vectors
  std::vector<int32_t> positions_, zero_positions_;
  RowMap row_map_{};  // width-vectorised; points into the next two vectors
  std::vector<int32_t> offsets_, zero_offsets_;
};

class GradTileLoader {
 public:
  GradTileLoader(const Blocking& blocking, int64_t channels)
      : row_pitch(blocking.in_segments() ? channels * blocking.row_vectors : blocking.row_vectors),
        channel_pitch(blocking.in_segments() || blocking.joins_rows() ? blocking.row_vectors
                                                                      : blocking.band_rows * blocking.row_vectors),
        // Joined rows: a vector of room, since whole vectors are written behind the end of a row.
        size((blocking.in_segments() ? blocking.band_rows * row_pitch : channels * channel_pitch + 1) * blocking.lanes),
        blocking_(blocking) {}

  // The planes of these channels. With joined rows, what lies behind the last one is left as it is: the tile must be 0
  // at first.
  void fill(const Images& grads, int64_t band, Range channels, float* tile);

  const int64_t row_pitch, channel_pitch;  // vectors from one row, one channel to the next
  const int64_t size;                      // of the tile, in floats

 private:
  PixelMap map_pixels(int64_t band);
  RowMap map_rows(int64_t band);

  const Blocking& blocking_;
  std::vector<int32_t> positions_, zero_positions_;  // of pixels, or of rows
};

}  // namespace sparse_adv
