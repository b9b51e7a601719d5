#include "cpu/masked_conv2d/batch_layout_kernel.h"

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

int lane_count() { return kLanes; }

// Column j of `count` rows becomes v[j]; rows beyond are 0, columns beyond `columns` undefined.
static inline void load_transposed(Vec v[kLanes], const float* source, int64_t row_size, int count, int columns) {
  if (count == kLanes && columns == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(source + i * row_size);
  } else {
    for (int i = 0; i < kLanes; ++i) v[i] = i < count ? load_first(source + i * row_size, columns) : broadcast(0.0f);
  }
  transpose(v);
}

void fill_window(const Images& images, const Placement& placement, int64_t first_channel, int64_t last_channel,
                 float* window) {
  const int64_t plane = placement.plane;
  for (int64_t c = first_channel; c < last_channel; ++c)
    for (int64_t i = 0; i < placement.gap_count; ++i)
      store(window + ((c - first_channel) * plane + placement.gaps[i]) * kLanes, broadcast(0.0f));
  Vec v[kLanes];
  if (images.channels_last) {
    for (int64_t p = 0; p < placement.pixel_count; ++p) {
      if (placement.place[p] < 0) continue;
      const float* pixel = images.data + (placement.first_pixel + p) * images.channels;
      for (int64_t c = first_channel; c < last_channel; c += kLanes) {
        const int columns = last_channel - c < kLanes ? static_cast<int>(last_channel - c) : kLanes;
        load_transposed(v, pixel + c, images.image_size, images.count, columns);
        for (int j = 0; j < columns; ++j)
          store(window + ((c - first_channel + j) * plane + placement.place[p]) * kLanes, v[j]);
      }
    }
    return;
  }
  for (int64_t c = first_channel; c < last_channel; ++c) {
    const float* channel = images.data + c * images.pixels + placement.first_pixel;
    float* to = window + (c - first_channel) * plane * kLanes;
    for (int64_t p = 0; p < placement.pixel_count; p += kLanes) {
      const int columns = placement.pixel_count - p < kLanes ? static_cast<int>(placement.pixel_count - p) : kLanes;
      const int32_t* place = placement.place + p;
      if (!placement.ascending) {
        int32_t largest = -1;
        for (int j = 0; j < columns; ++j) largest = place[j] > largest ? place[j] : largest;
        if (largest < 0) continue;
      }
      load_transposed(v, channel + p, images.image_size, images.count, columns);
      // Between ascending places that lie kLanes - 1 apart there is no gap.
      if (placement.ascending && columns == kLanes && place[kLanes - 1] - place[0] == kLanes - 1) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + (place[0] + static_cast<int64_t>(j)) * kLanes, v[j]);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
          if (j < columns && place[j] >= 0) store(to + static_cast<int64_t>(place[j]) * kLanes, v[j]);
      }
    }
  }
}

// Ends `count` consecutive elements of the output: adds the residual, applies the ReLU, stores.
static inline void finish(Vec v, const Epilogue& epilogue, float* output, int64_t at, int count) {
  if (epilogue.residual) v = add(v, load_first(epilogue.residual + at, count));
  if (epilogue.relu) v = relu(v);
  store_first(output + at, v, count);
}

static inline Vec scaled(const Sums& sums, const Epilogue& epilogue, int64_t k, int64_t at) {
  const Vec v = load(sums.data + (sums.plane_of[k] * sums.plane + at) * kLanes);
  if (epilogue.scale) return fma(v, broadcast(epilogue.scale[k]), broadcast(epilogue.bias ? epilogue.bias[k] : 0.0f));
  return epilogue.bias ? add(v, broadcast(epilogue.bias[k])) : v;
}

static void store_channels_last(const Sums& sums, const Epilogue& epilogue, const Images& shape, float* output) {
  Vec v[kLanes];
  for (int64_t p = 0; p < sums.pixel_count; ++p)
    for (int64_t k = 0; k < shape.channels; k += kLanes) {
      const int columns = shape.channels - k < kLanes ? static_cast<int>(shape.channels - k) : kLanes;
      for (int j = 0; j < kLanes; ++j)
        v[j] = j < columns ? scaled(sums, epilogue, k + j, sums.place[p]) : broadcast(0.0f);
      transpose(v);
      const int64_t at = (sums.first_pixel + p) * shape.channels + k;
      for (int i = 0; i < shape.count; ++i) finish(v[i], epilogue, output, i * shape.image_size + at, columns);
    }
}

void store_sums(const Sums& sums, const Epilogue& epilogue, const Images& shape, float* output) {
  if (shape.channels_last) return store_channels_last(sums, epilogue, shape, output);
  const bool plain = !epilogue.residual && !epilogue.relu && shape.count == kLanes;
  Vec v[kLanes];
  for (int64_t k = 0; k < shape.channels; ++k)
    for (int64_t p = 0; p < sums.pixel_count; p += kLanes) {
      const int columns = sums.pixel_count - p < kLanes ? static_cast<int>(sums.pixel_count - p) : kLanes;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        v[j] = j < columns ? scaled(sums, epilogue, k, sums.place[p + j]) : broadcast(0.0f);
      // The output's lines lie in as many pages as there are samples, where no hardware prefetcher follows.
      const int64_t ahead = p + 2 * kLanes < sums.pixel_count ? 2 * kLanes : shape.pixels - p;
      transpose(v);
      const int64_t at = k * shape.pixels + sums.first_pixel + p;
      for (int i = 0; i < shape.count; ++i) __builtin_prefetch(output + i * shape.image_size + at + ahead, 1, 2);
      if (plain && columns == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(output + i * shape.image_size + at, v[i]);
      } else {
        for (int i = 0; i < shape.count; ++i) finish(v[i], epilogue, output, i * shape.image_size + at, columns);
      }
    }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
