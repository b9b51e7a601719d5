#include "cpu/masked_conv2d/batch_layout_kernel.h"

#include "cpu/simd_epilogue.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

int lane_count() { return kLanes; }

// v[j] becomes column j of `count` rows; further rows are 0, columns from `columns` on undefined.
static inline void load_transposed(Vec v[kLanes], const float* source, int64_t row_size, int count, int columns) {
  if (count == kLanes && columns == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(source + i * row_size);
  } else {
    for (int i = 0; i < kLanes; ++i) v[i] = i < count ? load_first(source + i * row_size, columns) : broadcast(0.0f);
  }
  transpose(v);
}

void fill_batch_tile(const Images& images, const PixelMap& map, Range channels, float* tile) {
  const int64_t channel_pitch = map.channel_pitch;
  for (int64_t c = channels.begin; c < channels.end; ++c)
    for (int64_t i = 0; i < map.zero_count; ++i)
      store(tile + ((c - channels.begin) * channel_pitch + map.zero_positions[i]) * kLanes, broadcast(0.0f));
  Vec v[kLanes];
  if (images.channels_last) {
    for (int64_t p = 0; p < map.pixel_count; ++p) {
      if (map.positions[p] < 0) continue;
      const float* pixel = images.data + (map.first_pixel + p) * images.channels;
      for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
        const int columns = channels.end - c < kLanes ? static_cast<int>(channels.end - c) : kLanes;
        load_transposed(v, pixel + c, images.image_size, images.count, columns);
        for (int j = 0; j < columns; ++j)
          store(tile + ((c - channels.begin + j) * channel_pitch + map.positions[p]) * kLanes, v[j]);
      }
    }
    return;
  }
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const float* channel = images.data + c * images.pixels + map.first_pixel;
    float* to = tile + (c - channels.begin) * channel_pitch * kLanes;
    for (int64_t p = 0; p < map.pixel_count; p += kLanes) {
      const int columns = map.pixel_count - p < kLanes ? static_cast<int>(map.pixel_count - p) : kLanes;
      const int32_t* positions = map.positions + p;
      if (!map.ascending) {
        int32_t largest = -1;
        for (int j = 0; j < columns; ++j) largest = positions[j] > largest ? positions[j] : largest;
        if (largest < 0) continue;
      }
      load_transposed(v, channel + p, images.image_size, images.count, columns);
      // Ascending positions whose last is kLanes - 1 after the first have no gaps.
      if (map.ascending && columns == kLanes && positions[kLanes - 1] - positions[0] == kLanes - 1) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + (positions[0] + static_cast<int64_t>(j)) * kLanes, v[j]);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
          if (j < columns && positions[j] >= 0) store(to + static_cast<int64_t>(positions[j]) * kLanes, v[j]);
      }
    }
  }
}

static inline Vec scaled(const Accumulators& accumulators, const Epilogue<float>& epilogue, int64_t k, int64_t at) {
  const Vec v = load(accumulators.data + (accumulators.plane_of[k] * accumulators.channel_pitch + at) * kLanes);
  if (epilogue.scale) return fma(v, broadcast(epilogue.scale[k]), broadcast(epilogue.bias ? epilogue.bias[k] : 0.0f));
  return epilogue.bias ? add(v, broadcast(epilogue.bias[k])) : v;
}

static void store_channels_last(const Accumulators& accumulators, const Epilogue<float>& epilogue, const Images& output,
                                float* data) {
  Vec v[kLanes];
  for (int64_t p = 0; p < accumulators.pixel_count; ++p)
    for (int64_t k = accumulators.channels.begin; k < accumulators.channels.end; k += kLanes) {
      const int64_t left = accumulators.channels.end - k;
      const int columns = left < kLanes ? static_cast<int>(left) : kLanes;
      for (int j = 0; j < kLanes; ++j)
        v[j] = j < columns ? scaled(accumulators, epilogue, k + j, accumulators.positions[p]) : broadcast(0.0f);
      transpose(v);
      const int64_t at = (accumulators.first_pixel + p) * output.channels + k;
      BitsInRow<kLanes> bits{.row_start = (accumulators.first_pixel + p) * epilogue.gate_layout.row_bytes, .column = k};
      for (int i = 0; i < output.count; ++i, bits.row_start += epilogue.gate_layout.image_bytes) {
        const int64_t element = i * output.image_size + at;
        store_up_to(data + element, finish(v[i], epilogue, element, columns, bits), columns);
      }
    }
}

void store_accumulators(const Accumulators& accumulators, const Epilogue<float>& operands, const Images& output,
                        float* data) {
  const Epilogue<float> epilogue = operands;  // a copy can stay in registers, whatever is stored
  if (output.channels_last) return store_channels_last(accumulators, epilogue, output, data);
  const bool plain = !epilogue.residual && !epilogue.relu && !epilogue.gate && output.count == kLanes;
  Vec v[kLanes];
  for (int64_t k = accumulators.channels.begin; k < accumulators.channels.end; ++k) {
    BitsAcrossRows bits_of_first_image(epilogue.gate_layout, k * output.pixels + accumulators.first_pixel,
                                       output.pixels);
    for (int64_t p = 0; p < accumulators.pixel_count; p += kLanes, bits_of_first_image.advance(kLanes)) {
      const int columns =
          accumulators.pixel_count - p < kLanes ? static_cast<int>(accumulators.pixel_count - p) : kLanes;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        v[j] = j < columns ? scaled(accumulators, epilogue, k, accumulators.positions[p + j]) : broadcast(0.0f);
      // Each image lies in other pages, more than the hardware prefetcher follows. This prefetch cut the conversions of
      // 64 channels at 32x32 from 9.2 to 5.4 ms.
      const int64_t ahead = p + 2 * kLanes < accumulators.pixel_count ? 2 * kLanes : output.pixels - p;
      transpose(v);
      const int64_t at = k * output.pixels + accumulators.first_pixel + p;
      for (int i = 0; i < output.count; ++i) __builtin_prefetch(data + i * output.image_size + at + ahead, 1, 2);
      for (int i = 0; epilogue.residual && i < output.count; ++i)
        __builtin_prefetch(epilogue.residual + i * output.image_size + at + ahead);
      if (plain && columns == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(data + i * output.image_size + at, v[i]);
      } else {
        BitsAcrossRows bits = bits_of_first_image;
        for (int i = 0; i < output.count; ++i, bits.row_start += epilogue.gate_layout.image_bytes) {
          const int64_t element = i * output.image_size + at;
          store_up_to(data + element, finish(v[i], epilogue, element, columns, bits), columns);
        }
      }
    }
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
