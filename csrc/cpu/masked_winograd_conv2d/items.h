// How a call divides its images: into items of neighbouring rows of tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/masked_winograd_conv2d/conv_kernel.h"

namespace sparse_adv {

struct TileGeometry {
  int64_t C, H, W;  // of the input
  int64_t P, Q;     // rows and columns of the output
  int64_t pad_rows, pad_cols;
  int64_t tiles_of_run;          // 1, or those of a joined run
  int64_t tile_rows, tile_cols;  // tiles of an image; columns are whole runs

  // For images of size `input`, with as many tiles in a joined run.
  TileGeometry(const std::vector<int64_t>& input, const std::vector<int64_t>& padding, int64_t joined_tiles);
};

// The tables that a TileItem points to; they last until the next item is built.
class ItemTables {
 public:
  explicit ItemTables(const TileGeometry& geometry) : g_(geometry) {}

  // The rows of tiles [begin, end), counted over all images.
  TileItem build(int64_t begin, int64_t end);

 private:
  TileRun run_at(int64_t image, int64_t row, int64_t col, int64_t plane) const;
  void add_writes(int64_t image, int64_t row, int64_t plane);

  const TileGeometry& g_;
  std::vector<TileRun> runs_;
  std::vector<PixelRun> writes_;
};

}  // namespace sparse_adv
