// A tile of channels_last images in the transformed domain.
#pragma once

#include "cpu/winograd_conv2d/conv_kernel.h"
#include "cpu/winograd_conv2d/transforms.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Row and column, in the output, of the first pixel of a tile.
struct Corner {
  int64_t image, row, col;

  Corner(const Winograd& conv, int64_t tile) {
    const int64_t tiles_of_image = conv.tile_rows * conv.tile_cols, number = tile % tiles_of_image;
    image = tile / tiles_of_image;
    row = number / conv.tile_cols * conv.tile;
    col = number % conv.tile_cols * conv.tile;
  }
};

// Writes the transformed input of a tile to v[element * pitch + channel].
template <int TILE>
static void input_of_tile(const Winograd& conv, const float* input, int64_t tile, float* v, int64_t pitch) {
  constexpr int kSide = TILE + 2;
  const Corner corner(conv, tile);
  const float* pixels[kSide * kSide];  // null in the padding
  for (int r = 0; r < kSide; ++r)
    for (int s = 0; s < kSide; ++s) {
      const int64_t row = corner.row - conv.pad_rows + r, col = corner.col - conv.pad_cols + s;
      const bool inside = row >= 0 && row < conv.H && col >= 0 && col < conv.W;
      pixels[r * kSide + s] = inside ? input + ((corner.image * conv.H + row) * conv.W + col) * conv.C : nullptr;
    }
  for (int64_t c = 0; c < conv.C; c += kLanes) {
    const int count = conv.C - c < kLanes ? static_cast<int>(conv.C - c) : kLanes;
    Vec d[kSide * kSide];
    for (int s = 0; s < kSide; ++s) {
#pragma GCC unroll 6
      for (int r = 0; r < kSide; ++r) {
        const float* const pixel = pixels[r * kSide + s];
        d[r * kSide + s] = pixel ? load_up_to(pixel + c, count) : broadcast(0.0f);
      }
      transform_input<TILE>(d + s, kSide);
    }
    for (int r = 0; r < kSide; ++r) {
      transform_input<TILE>(d + r * kSide, 1);
#pragma GCC unroll 6
      for (int s = 0; s < kSide; ++s) store_up_to(v + (r * kSide + s) * pitch + c, d[r * kSide + s], count);
    }
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
