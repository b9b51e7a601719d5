// Winograd's filtering of live filters: the transformed filters and the items of a convolution, against direct loops.
#include "common/rounding.h"
#include "cpp/kernels_check.h"
#include "cpu/masked_winograd_conv2d/items.h"

namespace sparse_adv {

namespace {

constexpr int64_t kImages = 3, kChannels = 5, kOutChannels = 7;

// The filters of some channels, with a row without any.
struct Filters {
  std::vector<int32_t> row_offsets{0}, channels, rows;
  std::vector<float> weight = numbers(kOutChannels * kChannels * 9), values;
  std::vector<uint8_t> mask = std::vector<uint8_t>(weight.size());
  int64_t oc_block;

  explicit Filters(int64_t block) : oc_block(block) {
    for (int64_t row = 0; row < divide_up(kOutChannels, block); ++row) {
      for (int64_t c = row == 1 ? kChannels : below(2); c < kChannels; c += 1 + below(2)) {
        channels.push_back(static_cast<int32_t>(c));
        rows.push_back(static_cast<int32_t>(row));
        for (int64_t k = row * block; k < std::min((row + 1) * block, kOutChannels); ++k)
          for (int64_t tap = 0; tap < 9; ++tap) mask[(k * kChannels + c) * 9 + tap] = below(4) > 0;
      }
      row_offsets.push_back(static_cast<int32_t>(channels.size()));
    }
    values.assign(kElements * channels.size() * block, kUntouched);
  }

  LiveFilters live() const {
    return {.oc_block = oc_block,
            .oc_blocks = std::ssize(row_offsets) - 1,
            .row_offsets = row_offsets.data(),
            .channels = channels.data(),
            .count = std::ssize(channels)};
  }

  void transform(const Kernels& kernels) {
    const MaskedFilters source{.weight = {.first = weight.data(),
                                          .out_stride = kChannels * 9,
                                          .in_stride = 9,
                                          .row_stride = 3,
                                          .col_stride = 1,
                                          .out_channels = kOutChannels,
                                          .in_channels = kChannels},
                               .mask = mask.data(),
                               .out_stride = kChannels * 9,
                               .in_stride = 9,
                               .tap_stride = 1};
    const int64_t count = std::ssize(channels), middle = std::min<int64_t>(kTileGroup, count);
    kernels.masked_winograd_weight(source, live(), rows.data(), 0, middle, values.data());
    kernels.masked_winograd_weight(source, live(), rows.data(), middle, count, values.data());
  }
};

double sum_at(const TileGeometry& g, const Filters& filters, const std::vector<float>& input, int64_t at) {
  const int64_t col = at % g.Q, row = at / g.Q % g.P, k = at / g.Q / g.P % kOutChannels;
  const int64_t image = at / g.Q / g.P / kOutChannels;
  double sum = 0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t y = row - g.pad_rows + tap / 3, x = col - g.pad_cols + tap % 3;
    if (y < 0 || y >= g.H || x < 0 || x >= g.W) continue;
    for (int64_t c = 0; c < kChannels; ++c) {
      const int64_t weight = (k * kChannels + c) * 9 + tap;
      if (filters.mask[weight])
        sum += static_cast<double>(filters.weight[weight]) * input[((image * kChannels + c) * g.H + y) * g.W + x];
    }
  }
  return sum;
}

// The first and the last row of tiles are left out.
bool check(const Kernels& kernels, int64_t oc_block, Activation activation, int64_t rows, int64_t cols,
           int64_t padding) {
  const TileGeometry g({kImages, kChannels, rows, cols}, {padding, padding}, kernels.masked_winograd_joined_tiles());
  Filters filters(oc_block);
  filters.transform(kernels);
  const std::vector<float> input = numbers(kImages * kChannels * rows * cols), bias = numbers(kOutChannels),
                           residual = numbers(kImages * kOutChannels * g.P * g.Q);
  std::vector<float> actual(residual.size(), kUntouched);
  Gates gates(activation, std::ssize(actual), g.Q, std::ssize(actual) / kImages);
  Epilogue<float> epilogue{.bias = bias.data(), .residual = residual.data()};
  gates.activate(epilogue);
  const ConvSizes sizes{.C = kChannels,
                        .K = kOutChannels,
                        .input_pixels = rows * cols,
                        .input_row_size = cols,
                        .output_pixels = g.P * g.Q,
                        .output_row_size = g.Q,
                        .slice = 4};
  ItemTables tables(g);
  const int64_t begin = 1, end = kImages * g.tile_rows - 1;
  const TileItem item = tables.build(begin, end);
  std::vector<float> scratch(sizes.scratch(item), kUntouched);
  kernels.masked_winograd_item(sizes, filters.live(), filters.values.data(), item, input.data(), actual.data(),
                               epilogue, scratch.data());

  std::vector<double> expected(actual.size(), kUntouched);
  for (int64_t at = 0; at < std::ssize(expected); ++at) {
    const int64_t row = at / g.Q % g.P, image = at / g.Q / g.P / kOutChannels;
    const int64_t tile_row = image * g.tile_rows + row / 4;
    if (tile_row >= begin && tile_row < end)
      expected[at] = with_epilogue(epilogue, sum_at(g, filters, input, at), at / g.Q / g.P % kOutChannels, at);
  }
  return equal(actual, expected) && gates.fit(actual);
}

}  // namespace

bool check_masked_winograd(const Kernels& kernels) {
  bool good = true;
  for (const Activation activation : kActivations)
    for (const int64_t oc_block : {1, 2, 4})
      for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{8, 32}, {4, 4}, {9, 28}, {7, 9}, {1, 1}})
        for (const int64_t padding : {0, 1, 2})
          if (std::min(rows, cols) + 2 * padding >= 3)
            good &= check(kernels, oc_block, activation, rows, cols, padding);
  return good;
}

}  // namespace sparse_adv
