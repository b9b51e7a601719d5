#include "cpu/masked_winograd_conv2d/items.h"

#include <algorithm>

#include "common/rounding.h"

namespace sparse_adv {

namespace {

constexpr int64_t kTile = 4;  // rows and columns of a tile's output pixels

}  // namespace

TileGeometry::TileGeometry(const std::vector<int64_t>& input, const std::vector<int64_t>& padding, int64_t joined_tiles)
    : C(input[1]),
      H(input[2]),
      W(input[3]),
      P(H + 2 * padding[0] - 2),
      Q(W + 2 * padding[1] - 2),
      pad_rows(padding[0]),
      pad_cols(padding[1]),
      tiles_of_run(joined_tiles),
      tile_rows(divide_up(P, kTile)),
      tile_cols(divide_up(Q, kTile)) {
  // Up to a sixth of the tiles may be added to fill the last run of a row, as in rows of 28 pixels.
  if (6 * round_up(tile_cols, tiles_of_run) > 7 * tile_cols) tiles_of_run = 1;
  tile_cols = round_up(tile_cols, tiles_of_run);
}

TileItem ItemTables::build(int64_t begin, int64_t end) {
  const bool joined = g_.tiles_of_run > 1;
  const int64_t pitch = kTile * g_.tile_cols, plane_size = (end - begin) * kTile * pitch;
  runs_.clear();
  writes_.clear();
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    const int64_t image = tile_row / g_.tile_rows, row = tile_row % g_.tile_rows * kTile;
    const int64_t plane = (tile_row - begin) * kTile * pitch;
    for (int64_t tile = 0; tile < g_.tile_cols; tile += g_.tiles_of_run)
      runs_.push_back(run_at(image, row, tile * kTile, plane + tile * kTile));
    if (!joined) add_writes(image, row, plane);
  }
  // The tiles that fill the last vector read nothing, and write behind the plane if there is one.
  const int64_t tiles = round_up(static_cast<int64_t>(runs_.size()) * g_.tiles_of_run, kTileGroup);
  TileRun filling;
  filling.plane = plane_size;
  runs_.resize(tiles / g_.tiles_of_run, filling);
  return {.joined = joined,
          .tiles = tiles,
          .runs = runs_.data(),
          .plane_pitch = pitch,
          .plane_size = joined ? 0 : plane_size + kTile * pitch + kTileGroup,
          .writes = writes_.data(),
          .write_count = static_cast<int64_t>(writes_.size())};
}

TileRun ItemTables::run_at(int64_t image, int64_t row, int64_t col, int64_t plane) const {
  const int64_t top = row - g_.pad_rows, left = col - g_.pad_cols, pixels = kTile * g_.tiles_of_run;
  TileRun run;
  run.plane = plane;
  run.cols = static_cast<int>(std::clamp<int64_t>(g_.Q - col, 0, pixels));
  if (run.cols == 0) return run;  // it fills the last run of a row
  run.rows = static_cast<int>(std::min(kTile, g_.P - row));
  run.input = (image * g_.C * g_.H + top) * g_.W + left;
  run.image = image;
  run.row = row;
  run.col = col;
  uint16_t first = 0, last = 0;
  for (int64_t i = 0; i < pixels; ++i) {
    if (left + i >= 0 && left + i < g_.W) first |= static_cast<uint16_t>(1 << i);
    if (left + i + 4 < g_.W) last |= static_cast<uint16_t>(1 << i);
  }
  for (int r = 0; r < kWindow; ++r) {
    const bool inside = top + r >= 0 && top + r < g_.H;
    run.first[r] = inside ? first : 0;
    run.last[r] = inside ? last : 0;
  }
  return run;
}

// The pixels of a row of tiles, in one run with those before if nothing lies between them in the output.
void ItemTables::add_writes(int64_t image, int64_t row, int64_t plane) {
  const int64_t pitch = kTile * g_.tile_cols, rows = std::min(kTile, g_.P - row);
  if (pitch != g_.Q) {
    for (int64_t r = 0; r < rows; ++r)
      writes_.push_back({.plane = plane + r * pitch, .image = image, .pixel = (row + r) * g_.Q, .size = g_.Q});
  } else if (!writes_.empty() && writes_.back().image == image) {
    writes_.back().size += rows * g_.Q;
  } else {
    writes_.push_back({.plane = plane, .image = image, .pixel = row * g_.Q, .size = rows * g_.Q});
  }
}

}  // namespace sparse_adv
