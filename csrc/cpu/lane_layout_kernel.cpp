#include "cpu/lane_layout_kernel.h"

#include "cpu/lanes.h"

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
      store(window + (c * plane + placement.gaps[i]) * kLanes, broadcast(0.0f));
  Vec v[kLanes];
  if (images.channels_last) {
    for (int64_t p = 0; p < placement.pixel_count; ++p) {
      if (placement.place[p] < 0) continue;
      const float* pixel = images.data + (placement.first_pixel + p) * images.channels;
      for (int64_t c = first_channel; c < last_channel; c += kLanes) {
        const int columns = last_channel - c < kLanes ? static_cast<int>(last_channel - c) : kLanes;
        load_transposed(v, pixel + c, images.image_size, images.count, columns);
        for (int j = 0; j < columns; ++j) store(window + ((c + j) * plane + placement.place[p]) * kLanes, v[j]);
      }
    }
    return;
  }
  for (int64_t c = first_channel; c < last_channel; ++c) {
    const float* channel = images.data + c * images.pixels + placement.first_pixel;
    float* to = window + c * plane * kLanes;
    for (int64_t p = 0; p < placement.pixel_count; p += kLanes) {
      const int columns = placement.pixel_count - p < kLanes ? static_cast<int>(placement.pixel_count - p) : kLanes;
      load_transposed(v, channel + p, images.image_size, images.count, columns);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        if (j < columns && placement.place[p + j] >= 0)
          store(to + static_cast<int64_t>(placement.place[p + j]) * kLanes, v[j]);
    }
  }
}

// Ends `count` consecutive elements of the output: adds the residual, applies the ReLU, stores.
static inline void finish(Vec v, const Epilogue& epilogue, float* output, int64_t at, int count) {
  if (epilogue.residual) v = add(v, load_first(epilogue.residual + at, count));
  if (epilogue.relu) v = relu(v);
  store_first(output + at, v, count);
}

static inline Vec scaled(const Tile& tile, const Epilogue& epilogue, int64_t k, int q) {
  Vec v = load(tile.data + (static_cast<int64_t>(tile.row_of[k]) * kTilePixels + q) * kLanes);
  if (epilogue.scale) v = fma(v, broadcast(epilogue.scale[k]), broadcast(epilogue.bias ? epilogue.bias[k] : 0.0f));
  else if (epilogue.bias) v = add(v, broadcast(epilogue.bias[k]));
  return v;
}

void store_tile(const Tile& tile, const Epilogue& epilogue, const Images& shape, float* output) {
  Vec v[kLanes];
  if (shape.channels_last) {
    for (int q = 0; q < kTilePixels; ++q) {
      if (tile.place[q] < 0) continue;
      for (int64_t k = 0; k < shape.channels; k += kLanes) {
        const int columns = shape.channels - k < kLanes ? static_cast<int>(shape.channels - k) : kLanes;
        for (int j = 0; j < kLanes; ++j) v[j] = j < columns ? scaled(tile, epilogue, k + j, q) : broadcast(0.0f);
        transpose(v);
        for (int i = 0; i < shape.count; ++i)
          finish(v[i], epilogue, output, i * shape.image_size + tile.place[q] * shape.channels + k, columns);
      }
    }
    return;
  }
  // Runs of consecutive output pixels: a whole vector where the tile's pixels follow each other, else row by row.
  int run_start[kTilePixels], run_length[kTilePixels], runs = 0;
  for (int q = 0; q < kTilePixels; ++q) {
    if (tile.place[q] < 0) continue;
    const bool goes_on = runs > 0 && q % kLanes != 0 && run_start[runs - 1] + run_length[runs - 1] == q &&
                         tile.place[q] == tile.place[q - 1] + 1;
    if (goes_on) {
      ++run_length[runs - 1];
    } else {
      run_start[runs] = q;
      run_length[runs++] = 1;
    }
  }
  const bool whole = runs == kTilePixels / kLanes && run_length[0] == kLanes && run_length[runs - 1] == kLanes;
  float rows[kLanes * kLanes + kLanes];  // a run may be loaded as a whole vector from near the end
  for (int64_t k = 0; k < shape.channels; ++k) {
    const int64_t channel = k * shape.pixels;
    int run = 0;
    for (int q = 0; q < kTilePixels; q += kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) v[j] = scaled(tile, epilogue, k, q + j);
      transpose(v);
      if (whole) {
        const int64_t at = channel + tile.place[q];
        if (epilogue.residual || epilogue.relu || shape.count < kLanes) {
          for (int i = 0; i < shape.count; ++i) finish(v[i], epilogue, output, i * shape.image_size + at, kLanes);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store(output + i * shape.image_size + at, v[i]);
        }
        continue;
      }
      for (int i = 0; i < kLanes; ++i) store(rows + i * kLanes, v[i]);
      for (; run < runs && run_start[run] < q + kLanes; ++run) {
        const int64_t at = channel + tile.place[run_start[run]];
        for (int i = 0; i < shape.count; ++i)
          finish(load(rows + i * kLanes + run_start[run] - q), epilogue, output, i * shape.image_size + at,
                 run_length[run]);
      }
    }
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
