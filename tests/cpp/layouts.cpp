// Between images and the two vectorised layouts.
#include "cpp/kernels_check.h"

namespace sparse_adv {

static Images images_at(const float* data, int64_t channels, int64_t pixels, bool channels_last, int count) {
  return {.data = data,
          .image_size = channels * pixels,
          .channels = channels,
          .pixels = pixels,
          .channels_last = channels_last,
          .count = count};
}

static int64_t element(const Images& images, int64_t image, int64_t channel, int64_t pixel) {
  return image * images.image_size +
         (images.channels_last ? pixel * images.channels + channel : channel * images.pixels + pixel);
}

static bool check_fill_batch_tile(const Kernels& kernels, bool channels_last, int count, int64_t first_pixel,
                                  bool ascending) {
  const int64_t channels = 2 * kernels.lanes + 3, pixels = 4 * kernels.lanes + 5, channel_pitch = pixels + 6;
  const std::vector<float> data = numbers(count * channels * pixels);
  const Images images = images_at(data.data(), channels, pixels, channels_last, count);
  // Ascending with a gap after every lanes + 2 pixels, or descending with one pixel that is left out.
  std::vector<int32_t> positions(pixels - first_pixel), zero_positions;
  for (int32_t i = 0; i < std::ssize(positions); ++i)
    positions[i] = ascending ? i + i / (kernels.lanes + 2) : i == 1 ? -1 : static_cast<int32_t>(channel_pitch - 2 - i);
  for (int32_t i = 0; i < channel_pitch; ++i)
    if (std::ranges::find(positions, i) == positions.end()) zero_positions.push_back(i);
  const PixelMap map{.first_pixel = first_pixel,
                     .pixel_count = std::ssize(positions),
                     .positions = positions.data(),
                     .zero_positions = zero_positions.data(),
                     .zero_count = std::ssize(zero_positions),
                     .channel_pitch = channel_pitch,
                     .ascending = ascending};
  const Range written{.begin = 1, .end = channels};
  std::vector<float> tile((written.end - written.begin) * channel_pitch * kernels.lanes, kUntouched);
  kernels.fill_batch_tile(images, map, written, tile.data());

  std::vector<double> expected(tile.size());
  for (int64_t c = written.begin; c < written.end; ++c)
    for (int64_t p = 0; p < std::ssize(positions); ++p)
      for (int i = 0; i < count && positions[p] >= 0; ++i)
        expected[((c - written.begin) * channel_pitch + positions[p]) * kernels.lanes + i] =
            data[element(images, i, c, first_pixel + p)];
  return equal(tile, expected);
}

bool check_fill_batch_tile(const Kernels& kernels) {
  bool good = true;
  for (bool channels_last : {false, true})
    for (int count : {1, kernels.lanes - 1, kernels.lanes})
      for (int64_t first_pixel : {0, 3})
        for (bool ascending : {false, true})
          good &= check_fill_batch_tile(kernels, channels_last, count, first_pixel, ascending);
  return good;
}

// Where rows overlap, the zeros behind a row are written before the next row. With `split` the pixels of odd number go
// to rows of their own, behind all others and a float further on.
static bool check_fill_width_tile(const Kernels& kernels, int64_t row_size, int64_t last_row_size, int64_t tile_row,
                                  int64_t row_count, bool overlap, bool split) {
  const int64_t lanes = kernels.lanes, channels = 4, first = 1, image_rows = 5, first_row = 1, tile_rows = 6;
  const int64_t whole = (row_size + lanes - 1) / lanes * lanes, lead = lanes, left_out = 1,
                pitch = overlap ? row_size + 1 : lead + whole + lanes, phase = tile_rows * pitch + 3 * lanes;
  std::vector<int32_t> offsets, zero_offsets;
  for (int64_t r = 0; r < tile_rows; ++r) {
    const auto offset = static_cast<int32_t>(r * pitch);
    if (r >= tile_row && r < tile_row + row_count)
      offsets.push_back(r == left_out ? -1 : offset);
    else
      zero_offsets.push_back(offset);
  }
  const RowMap map{.row_size = row_size,
                   .last_row_size = last_row_size,
                   .first_pixel = first_row * row_size,
                   .row_count = row_count,
                   .offsets = offsets.data(),
                   .zero_offsets = zero_offsets.data(),
                   .zero_count = std::ssize(zero_offsets),
                   .tile_row_size = whole + lanes,
                   .channel_pitch = (split ? 2 : 1) * phase,
                   .odd_offset = split ? phase + 1 : 0};
  const std::vector<float> image = numbers(channels * image_rows * row_size);
  std::vector<float> tile((channels - first) * map.channel_pitch, kUntouched);
  kernels.fill_width_tile(image.data(), image_rows * row_size, map, {.begin = first, .end = channels},
                          tile.data() + lead);

  std::vector<double> expected(tile.size(), kUntouched);
  for (int64_t c = first; c < channels; ++c) {
    double* const plane = expected.data() + (c - first) * map.channel_pitch + lead;
    for (const int32_t offset : zero_offsets) std::fill_n(plane + offset, map.tile_row_size, 0.0);
    for (int64_t r = 0; r < row_count; ++r) {
      if (offsets[r] < 0) continue;
      const int64_t size = r + 1 < row_count ? row_size : last_row_size;
      for (int64_t odd = 0; odd < (split ? 2 : 1); ++odd)
        for (int64_t i = 0; i < map.tile_row_size; ++i) {
          const int64_t x = split ? 2 * i + odd : i;
          plane[offsets[r] + odd * map.odd_offset + i] =
              x < size ? image[(c * image_rows + first_row + r) * row_size + x] : 0.0;
        }
    }
  }
  return equal(tile, expected);
}

bool check_fill_width_tile(const Kernels& kernels) {
  bool good = true;
  for (int64_t row_size :
       {int64_t{1}, int64_t{kernels.lanes}, kernels.lanes + int64_t{3}, 2 * kernels.lanes + int64_t{5}})
    for (int64_t tile_row : {0, 2})
      for (int64_t row_count : {0, 1, 4})
        for (int64_t last_row_size : {row_size, (row_size + 1) / 2})
          for (bool overlap : {false, true})
            for (bool split : {false, true})
              good &= check_fill_width_tile(kernels, row_size, last_row_size, tile_row, row_count, overlap, split);
  return good;
}

// The first row of each image is not written.
static bool check_store_accumulators(const Kernels& kernels, const Images& shape, int64_t row_size, bool affine,
                                     bool residual, Activation activation) {
  const int64_t channel_pitch = shape.pixels + 3, size = shape.count * shape.image_size, first = row_size,
                count = shape.pixels - first;
  const std::vector<float> data = numbers((shape.channels + 2) * channel_pitch * kernels.lanes);
  std::vector<int32_t> plane_of(shape.channels), positions(count);
  for (size_t k = 0; k < plane_of.size(); ++k) plane_of[k] = static_cast<int32_t>(k + (k > 1 ? 2 : 0));
  for (int64_t p = 0; p < count; ++p) positions[p] = static_cast<int32_t>(p % 2 ? channel_pitch - 1 - p : p);
  const std::vector<float> scale = numbers(shape.channels), bias = numbers(shape.channels), added = numbers(size);
  Epilogue<float> epilogue{.scale = affine ? scale.data() : nullptr,
                           .bias = affine ? bias.data() : nullptr,
                           .residual = residual ? added.data() : nullptr};
  Gates gates(activation, size, shape.channels_last ? shape.channels : row_size, shape.image_size);
  gates.activate(epilogue);
  std::vector<float> output(size, kUntouched);
  const int64_t middle = std::min<int64_t>(std::max(8, kernels.lanes), shape.channels);  // whole bytes of a gate
  for (const Range channels : {Range{middle, shape.channels}, Range{0, middle}})
    kernels.store_accumulators({.data = data.data(),
                                .plane_of = plane_of.data(),
                                .channel_pitch = channel_pitch,
                                .first_pixel = first,
                                .pixel_count = count,
                                .positions = positions.data(),
                                .channels = channels},
                               epilogue, shape, output.data());

  std::vector<double> expected(size, kUntouched);
  for (int i = 0; i < shape.count; ++i)
    for (int64_t k = 0; k < shape.channels; ++k)
      for (int64_t p = 0; p < count; ++p) {
        const int64_t at = element(shape, i, k, first + p);
        expected[at] =
            with_epilogue(epilogue, data[(plane_of[k] * channel_pitch + positions[p]) * kernels.lanes + i], k, at);
      }
  return equal(output, expected) && gates.fit(output);
}

enum class Residual { none, output, another };

// Three rows, all of the image or from the third one on, in planes with a gap between them and behind each row.
static bool check_store_joined_rows(const Kernels& kernels, int64_t row_size, int64_t row_phases, int64_t col_phases,
                                    bool all_rows, bool affine, Residual residual, Activation activation) {
  const int64_t channels = 3, first_row = all_rows ? 0 : 2, row_count = 3, image_rows = all_rows ? 3 : 6;
  const int64_t pixels = image_rows * row_size, size = channels * pixels;
  const std::vector<int32_t> plane_of{0, 3, 4};
  const int64_t positions = (row_size + col_phases - 1) / col_phases, row_pitch = positions + 2,
                phase_pitch = 3 * row_pitch + 1, channel_pitch = row_phases * col_phases * phase_pitch + 5;
  const std::vector<float> data = numbers(5 * channel_pitch + kernels.lanes);
  const std::vector<float> scale = numbers(channels), bias = numbers(channels), added = numbers(size);
  JoinedRows rows{.data = data.data(),
                  .plane_of = plane_of.data(),
                  .channel_pitch = channel_pitch,
                  .phase_pitch = phase_pitch,
                  .row_pitch = row_pitch,
                  .row_phases = row_phases,
                  .col_phases = col_phases,
                  .first_row = first_row,
                  .row_count = row_count,
                  .row_size = row_size,
                  .channels = {}};
  std::vector<float> output(size, kUntouched);
  for (int64_t k = 0; residual == Residual::output && k < channels; ++k) {
    const int64_t at = k * pixels + first_row * row_size;
    std::copy_n(added.data() + at, row_count * row_size, output.data() + at);
  }
  Epilogue<float> epilogue{.scale = affine ? scale.data() : nullptr,
                           .bias = affine ? bias.data() : nullptr,
                           .residual = residual == Residual::none     ? nullptr
                                       : residual == Residual::output ? output.data()
                                                                      : added.data()};
  Gates gates(activation, size, row_size, size);
  gates.activate(epilogue);
  std::vector<double> expected(size, kUntouched);
  for (const Range written : {Range{1, 3}, Range{0, 1}}) {
    rows.channels = written;
    kernels.store_joined_rows(rows, epilogue, channels, pixels, output.data());
  }
  if (epilogue.residual) epilogue.residual = added.data();
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t r = 0; r < row_count; ++r)
      for (int64_t x = 0; x < row_size; ++x) {
        const int64_t at = k * pixels + (first_row + r) * row_size + x;
        const int64_t phase = r % row_phases * col_phases + x % col_phases;
        const int64_t from = plane_of[k] * channel_pitch + phase * phase_pitch + r / row_phases * row_pitch;
        expected[at] = with_epilogue(epilogue, data[from + x / col_phases], k, at);
      }
  return equal(output, expected) && gates.fit(output);
}

bool check_store_joined_rows(const Kernels& kernels) {
  bool good = true;
  for (bool affine : {false, true})
    for (Activation activation : kActivations)
      for (int64_t row_size : {1, 5, 8, 14, 19, 24, 33})
        for (int64_t row_phases : {1, 2})
          for (int64_t col_phases : {1, 2})
            for (bool all_rows : {false, true})
              for (Residual residual : {Residual::none, Residual::output, Residual::another})
                good &= check_store_joined_rows(kernels, row_size, row_phases, col_phases, all_rows, affine, residual,
                                                activation);
  return good;
}

bool check_store_accumulators(const Kernels& kernels) {
  bool good = true;
  for (bool channels_last : {false, true})
    for (int count : {1, kernels.lanes - 1, kernels.lanes})
      for (bool affine : {false, true})
        for (Activation activation : kActivations)
          for (int64_t row_size : {1, 2, 4, 7, 8, 14, 24}) {
            const int64_t pixels = row_size * (6 * kernels.lanes / row_size + 1);
            good &=
                check_store_accumulators(kernels, images_at(nullptr, kernels.lanes + 3, pixels, channels_last, count),
                                         row_size, affine, activation != Activation::none, activation);
          }
  return good;
}

}  // namespace sparse_adv
