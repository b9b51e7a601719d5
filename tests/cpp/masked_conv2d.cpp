// The arithmetic of the convolution and its gradients, and the entries of its lists.
#include "cpp/kernels_check.h"
#include "cpu/masked_conv2d/pattern_layout.h"

namespace sparse_adv {

namespace {

// Lists of 0 to 4 * lanes entries, the second one empty, and a window that the entry with the largest offset reads to
// its end. In threes they are neighbouring columns, from the right to the left if `reversed`; sorted by column they
// read rows between zeros.
struct TileCase {
  static constexpr int64_t kVectors = 3, kSegments = 2;
  int64_t lanes, vector, row_pitch, reach, channels = kVectors * vector;
  Columns columns;
  std::vector<int32_t> rows{0}, offsets, turns;
  std::vector<float> values, window;

  TileCase(const Kernels& kernels, int64_t vector_, int cols, Columns columns_ = Columns::any, bool reversed = false)
      : lanes(kernels.lanes),
        vector(vector_),
        row_pitch((cols + 3) * lanes),
        reach((kTileVectors / cols - 1) * row_pitch + cols * lanes),
        columns(columns_) {
    if (columns == Columns::by_column) {
      fill_by_column(cols);
      return;
    }
    const int64_t largest = 5 * row_pitch, step = columns == Columns::threes_of_pixels ? 1 : lanes;
    // Threes of pixels read the vectors beside their middle column.
    const int64_t lead = columns == Columns::threes_of_pixels ? lanes - 1 : 0;
    const bool in_threes = columns != Columns::any;
    const auto push = [&](int64_t offset) {
      for (int i = 0; i < (in_threes ? 3 : 1); ++i)
        offsets.push_back(static_cast<int32_t>(lead + offset + (reversed ? 2 - i : i) * step));
    };
    for (int64_t i = 0; i < kVectors * kSegments; ++i) {
      for (int64_t entries = i == 1 ? 0 : below(4 * lanes); entries > 0; --entries) push(below(largest));
      if (i + 1 == kVectors * kSegments) push(largest);
      rows.push_back(static_cast<int32_t>(offsets.size()));
    }
    values = numbers(std::ssize(offsets) * vector);
    window = numbers(largest + reach + (in_threes ? 2 * lanes : 0));
  }
  void fill_by_column(int cols) {
    for (int64_t i = 0; i < kVectors * kSegments; ++i) {
      for (int64_t column : {-1, 0, 1}) {
        if (column > -1) turns.push_back(static_cast<int32_t>(std::ssize(offsets) - rows.back()));
        for (int64_t entries = i == 1 ? 0 : below(lanes); entries > 0; --entries)
          offsets.push_back(static_cast<int32_t>(below(6) * row_pitch + lanes + column));
      }
      rows.push_back(static_cast<int32_t>(offsets.size()));
    }
    values = numbers(std::ssize(offsets));
    window = numbers(5 * row_pitch + reach + 2 * lanes);
    for (int64_t at = lanes; at < std::ssize(window); at += row_pitch)
      for (int64_t beside : {at - 1, at + cols * lanes})
        if (beside < std::ssize(window)) window[beside] = 0;
  }
  OffsetLists lists() const {
    return {vector, kVectors, kSegments, rows.data(), offsets.data(), values.data(), columns, turns.data()};
  }
  float source(int32_t entry, int64_t at, int cols) const {
    return window[offsets[entry] + at / (cols * lanes) * row_pitch + at % (cols * lanes)];
  }
  double sum(int64_t channel, int64_t at, int cols) const {
    double sum = 0;
    for (int64_t segment = 0; segment < kSegments; ++segment) {
      const int64_t list = segment * kVectors + channel / vector;
      for (int32_t i = rows[list]; i < rows[list + 1]; ++i)
        sum += static_cast<double>(values[i * vector + channel % vector]) * source(i, at, cols);
    }
    return sum;
  }
};

}  // namespace

static bool check_sums(const Kernels& kernels, const TileCase& tile, int cols) {
  const int64_t lanes = kernels.lanes, row_pitch = (cols + 1) * lanes, plane = kTileVectors / cols * row_pitch;
  std::vector<float> sums((tile.channels - 1) * plane + plane - lanes, kUntouched);
  const Tile where{cols, tile.window.data(), tile.row_pitch, sums.data(), row_pitch, plane, nullptr};
  for (int64_t segment = 0; segment < TileCase::kSegments; ++segment)
    kernels.conv_tile(tile.lists(), segment, segment + 1, where);

  std::vector<double> expected(sums.size(), kUntouched);
  for (int64_t k = 0; k < tile.channels; ++k)
    for (int64_t at = 0; at < kTileVectors * lanes; ++at)
      expected[k * plane + at / (cols * lanes) * row_pitch + at % (cols * lanes)] = tile.sum(k, at, cols);
  return equal(sums, expected);
}

// The last two channels change places, the first one is not wanted; the image ends within the tile.
static bool check_output(const Kernels& kernels, const TileCase& tile, int cols, bool with_epilogue) {
  const int64_t lanes = kernels.lanes, all_rows = kTileVectors / cols, row_size = cols * lanes - lanes / 2;
  const TileOutput shape{nullptr, row_size, all_rows * row_size, std::max<int64_t>(1, all_rows - 1), row_size,
                         nullptr, {}};
  std::vector<int32_t> channel_of(tile.channels);
  for (int64_t k = 0; k < tile.channels; ++k) channel_of[k] = static_cast<int32_t>(k);
  std::swap(channel_of[tile.channels - 1], channel_of[tile.channels - 2]);
  channel_of[0] = -1;
  std::vector<float> sums(tile.channels * kTileVectors * lanes), output(tile.channels * shape.plane, kUntouched);
  const std::vector<float> affine = numbers(tile.channels), residual = numbers(std::ssize(output));
  TileOutput to = shape;
  to.data = output.data();
  to.channel_of = channel_of.data();
  if (with_epilogue) to.epilogue = {affine.data(), affine.data(), residual.data(), true};
  kernels.conv_tile(tile.lists(), 0, TileCase::kSegments,
                    {cols, tile.window.data(), tile.row_pitch, sums.data(), cols * lanes, kTileVectors * lanes, &to});

  std::vector<double> expected(output.size(), kUntouched);
  for (int64_t k = 1; k < tile.channels; ++k)
    for (int64_t r = 0; r < shape.rows; ++r)
      for (int64_t x = 0; x < row_size; ++x) {
        const int64_t at = channel_of[k] * shape.plane + r * row_size + x;
        expected[at] = ended(to.epilogue, tile.sum(k, r * cols * lanes + x, cols), channel_of[k], at);
      }
  return equal(output, expected);
}

bool check_conv_tile(const Kernels& kernels) {
  bool good = true;
  for (int cols : {16, 8, 4, 2, 1}) {
    std::vector<TileCase> cases;
    for (int64_t vector : {1, 2, 4}) cases.emplace_back(kernels, vector, cols);
    for (Columns columns : {Columns::threes_of_vectors, Columns::threes_of_pixels})
      for (bool reversed : {false, true}) cases.emplace_back(kernels, 1, cols, columns, reversed);
    cases.emplace_back(kernels, 1, cols, Columns::by_column);
    for (const TileCase& tile : cases)
      good &= check_sums(kernels, tile, cols) && check_output(kernels, tile, cols, false) &&
              check_output(kernels, tile, cols, true);
  }
  return good;
}

bool check_grad_weight_tile(const Kernels& kernels) {
  bool good = true;
  for (int64_t vector : {1, 2, 4})
    for (int cols : {16, 8, 4, 2, 1}) {
      const TileCase tile(kernels, vector, cols);
      const int64_t lanes = kernels.lanes, row_pitch = (cols + 1) * lanes, plane = kTileVectors / cols * row_pitch;
      const int64_t entries = std::ssize(tile.offsets);
      std::vector<int32_t> channel_of(tile.channels);
      for (int64_t k = 0; k < tile.channels; ++k) channel_of[k] = static_cast<int32_t>(tile.channels - 1 - k);
      const std::vector<float> grad = numbers((tile.channels - 1) * plane + plane - lanes);
      std::vector<float> totals = numbers(vector * entries);
      std::vector<double> expected(totals.begin(), totals.end());
      kernels.grad_weight_tile(
          tile.lists(), 0, TileCase::kSegments,
          {tile.window.data(), grad.data(), tile.row_pitch, row_pitch, plane, cols, channel_of.data()}, totals.data());

      for (int64_t list = 0; list < TileCase::kVectors * TileCase::kSegments; ++list)
        for (int32_t i = tile.rows[list]; i < tile.rows[list + 1]; ++i)
          for (int64_t j = 0; j < vector; ++j) {
            const int32_t k = channel_of[list % TileCase::kVectors * vector + j];
            for (int64_t at = 0; at < kTileVectors * lanes; ++at)
              expected[i * vector + j] +=
                  static_cast<double>(grad[k * plane + at / (cols * lanes) * row_pitch + at % (cols * lanes)]) *
                  tile.source(i, at, cols);
          }
      good &= equal(totals, expected);
    }
  return good;
}

bool check_entries(const Kernels& kernels) {
  const int64_t channels = 7, taps = 9, count = 37, plane = 100;
  std::vector<int32_t> tap_offset(taps), entries(count), offsets(count);
  for (int64_t tap = 0; tap < taps; ++tap) tap_offset[tap] = static_cast<int32_t>(10 * tap);
  for (int32_t& entry : entries) entry = static_cast<int32_t>(below(channels) << kTapBits | below(taps));
  kernels.entry_offsets(entries.data(), count, 3, plane, tap_offset.data(), offsets.data());
  bool good = kernels.entries_inside(entries.data(), count, channels, taps);
  for (int64_t i = 0; i < count; ++i)
    good &= offsets[i] == (entries[i] >> kTapBits & 3) * plane + 10 * (entries[i] & (kMaxTaps - 1));
  for (int64_t outside : {channels << kTapBits, taps, int64_t{-1}})
    for (int64_t at : {int64_t{0}, count - 1}) {
      std::vector<int32_t> wrong = entries;
      wrong[at] = static_cast<int32_t>(outside);
      good &= !kernels.entries_inside(wrong.data(), count, channels, taps);
    }
  std::vector<int32_t> threes;
  for (int32_t row : {0, 2, 1})
    for (int32_t tap = 0; tap < 3; ++tap) threes.push_back(4 << kTapBits | (3 * row + tap));
  good &= kernels.entries_in_threes(threes.data(), 9) && !kernels.entries_in_threes(threes.data(), 8) &&
          !kernels.entries_in_threes(threes.data() + 1, 6);
  std::swap(threes[7], threes[8]);
  return good && !kernels.entries_in_threes(threes.data(), 9);
}

}  // namespace sparse_adv
