#include "cpu/masked_conv2d/width_layout_kernel.h"

#include "cpu/simd_epilogue.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

static inline void clear_rows(float* from, int64_t count, const RowMap& map) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < map.tile_row_size; i += kLanes) store(from + r * map.row_pitch + i, broadcast(0.0f));
}

void fill_width_tile(const float* image, int64_t pixels, const RowMap& map, int64_t first_channel, int64_t last_channel,
                     float* tile) {
  const int64_t below = map.tile_row + map.row_count;
  for (int64_t c = first_channel; c < last_channel; ++c) {
    const float* from = image + c * pixels + map.first_pixel;
    float* const plane = tile + (c - first_channel) * map.channel_pitch;
    clear_rows(plane, map.tile_row, map);
    clear_rows(plane + below * map.row_pitch, map.tile_rows - below, map);
    float* to = plane + map.tile_row * map.row_pitch;
    for (int64_t r = 0; r < map.row_count; ++r, from += map.row_size, to += map.row_pitch) {
      const int64_t size = r + 1 < map.row_count ? map.row_size : map.last_row_size;
      const int64_t whole = size / kLanes * kLanes;
      const int rest = static_cast<int>(size - whole);
      int64_t i = 0;
      for (; i < whole; i += kLanes) store(to + i, load(from + i));
      if (rest > 0) {
        store(to + i, load_first(from + i, rest));
        i += kLanes;
      }
      for (; i < map.tile_row_size; i += kLanes) store(to + i, broadcast(0.0f));
    }
  }
}

void store_joined_rows(const JoinedRows& rows, const Epilogue<float>& operands, int64_t channels, int64_t pixels,
                       float* image) {
  const Epilogue<float> epilogue = operands;  // a copy can stay in registers, whatever is stored
  const bool plain = is_identity(epilogue), affine = epilogue.scale || epilogue.bias;
  const int64_t row_bytes = epilogue.gate_layout.row_bytes, channel_bytes = epilogue.gate_layout.image_bytes / channels;
  for (int64_t k = rows.first_channel; k < rows.last_channel; ++k) {
    const Vec scale = broadcast(epilogue.scale ? epilogue.scale[k] : 1.0f);
    const Vec bias = broadcast(epilogue.bias ? epilogue.bias[k] : 0.0f);
    const float* from = rows.data + rows.plane_of[k] * rows.channel_pitch;
    for (int64_t r = rows.first_row; r < rows.first_row + rows.row_count; ++r, from += rows.row_pitch) {
      const int64_t at = k * pixels + r * rows.row_size;
      for (int64_t i = 0; i < rows.row_size; i += kLanes) {
        const int64_t left = rows.row_size - i;
        const int count = left < kLanes ? static_cast<int>(left) : kLanes;
        Vec v = load(from + i);
        if (affine) v = fma(v, scale, bias);
        BitsInRow<kLanes> bits{.row_start = k * channel_bytes + r * row_bytes, .column = i};
        store_up_to(image + at + i, plain ? v : finish(v, epilogue, at + i, count, bits), count);
      }
    }
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
