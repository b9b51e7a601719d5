#include "cpu/masked_conv2d/width_layout_kernel.h"

#include "cpu/simd_epilogue.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// `left` floats of a row; the others are 0.
static inline Vec load_rest(const float* from, int64_t left) {
  if (left >= kLanes) return load(from);
  return left > 0 ? load_first(from, static_cast<int>(left)) : broadcast(0.0f);
}

static inline void copy_row(const float* from, int64_t size, int64_t tile_row_size, float* to) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(from + i));
  for (int64_t i = whole; i < tile_row_size; i += kLanes) store(to + i, load_rest(from + i, size - i));
}

static inline void split_row(const float* from, int64_t size, int64_t tile_row_size, float* to, float* to_odd) {
  const int64_t whole = size / (2 * kLanes) * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec a = load(from + 2 * i), b = load(from + 2 * i + kLanes);
    store(to + i, deinterleave_even(a, b));
    store(to_odd + i, deinterleave_odd(a, b));
  }
  for (int64_t i = whole; i < tile_row_size; i += kLanes) {
    const Vec a = load_rest(from + 2 * i, size - 2 * i);
    const Vec b = load_rest(from + 2 * i + kLanes, size - 2 * i - kLanes);
    store(to + i, deinterleave_even(a, b));
    store(to_odd + i, deinterleave_odd(a, b));
  }
}

void fill_width_tile(const float* image, int64_t pixels, const RowMap& map, Range channels, float* tile) {
  for (int64_t c = channels.begin; c < channels.end; ++c, tile += map.channel_pitch) {
    for (int64_t z = 0; z < map.zero_count; ++z)
      for (int64_t i = 0; i < map.tile_row_size; i += kLanes) store(tile + map.zero_offsets[z] + i, broadcast(0.0f));
    const float* from = image + c * pixels + map.first_pixel;
    for (int64_t r = 0; r < map.row_count; ++r, from += map.row_size) {
      if (map.offsets[r] < 0) continue;
      const int64_t size = r + 1 < map.row_count ? map.row_size : map.last_row_size;
      prefetch(from + pixels, size);  // the next channel, whose page no hardware prefetcher foresees
      float* const to = tile + map.offsets[r];
      if (map.odd_offset == 0)
        copy_row(from, size, map.tile_row_size, to);
      else
        split_row(from, size, map.tile_row_size, to, to + map.odd_offset);
    }
  }
}

// Everything is stored in ascending order and in whole vectors, which reach into what is stored next, but never beyond
// the band's last element, and not if the residual is the output itself, which would be read after it was overwritten.
// On AVX2 a masked store takes as long as several others.
void store_joined_rows(const JoinedRows& rows, const Epilogue<float>& operands, int64_t channels, int64_t pixels,
                       float* image) {
  const Epilogue<float> epilogue = operands;  // a copy can stay in registers, whatever is stored
  const bool plain = is_identity(epilogue), affine = epilogue.scale || epilogue.bias;
  const int64_t row_bytes = epilogue.gate_layout.row_bytes, channel_bytes = epilogue.gate_layout.image_bytes / channels;
  const int64_t size = rows.row_size, end_row = rows.first_row + rows.row_count;
  const bool whole_channels = rows.row_count * size == pixels, adds_to_image = epilogue.residual == image;
  for (int64_t k = rows.channels.begin; k < rows.channels.end; ++k) {
    const Vec scale = broadcast(epilogue.scale ? epilogue.scale[k] : 1.0f);
    const Vec bias = broadcast(epilogue.bias ? epilogue.bias[k] : 0.0f);
    const int64_t end = whole_channels ? rows.channels.end * pixels : k * pixels + end_row * size;
    const auto store_row = [&](int64_t row, const float* from) {
      const int64_t at = k * pixels + row * size;
      const auto store_at = [&](int64_t i, Vec v) {
        const int count = size - i < kLanes ? static_cast<int>(size - i) : kLanes;
        if (affine) v = fma(v, scale, bias);
        BitsInRow<kLanes> bits{.row_start = k * channel_bytes + row * row_bytes, .column = i};
        if (!plain) v = finish(v, epilogue, at + i, count, bits);
        store_up_to(image + at + i, v, !adds_to_image && at + i + kLanes <= end ? kLanes : count);
      };
      if (rows.col_phases == 1) {
        for (int64_t i = 0; i < size; i += kLanes) store_at(i, load(from + i));
        return;
      }
      for (int64_t i = 0; i < size; i += 2 * kLanes) {
        const Vec a = load(from + i / 2), b = load(from + rows.phase_pitch + i / 2);
        store_at(i, interleave_low(a, b));
        if (i + kLanes < size) store_at(i + kLanes, interleave_high(a, b));
      }
    };
    const float* from = rows.data + rows.plane_of[k] * rows.channel_pitch;
    for (int64_t row = rows.first_row; row < end_row; from += rows.row_pitch)
      for (int64_t phase = 0; phase < rows.row_phases && row < end_row; ++phase, ++row)
        store_row(row, from + phase * rows.col_phases * rows.phase_pitch);
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
