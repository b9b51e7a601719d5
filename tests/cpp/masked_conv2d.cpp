// The arithmetic of the convolution and its gradients, and the checks of column indices.
#include "common/pattern_layout.h"
#include "cpp/kernels_check.h"

namespace sparse_adv {

namespace {

// Weights with rows of 0 to 4 * lanes column indices, the second row empty, and an input tile that ends with the last
// element that the largest offset reads. In triples, the indices read neighbouring columns, from right to left if
// `reversed`; sorted by column, they read rows with zeros on both sides.
struct WeightsAndInput {
  static constexpr int64_t kOcBlocks = 3, kIcBlocks = 2, kRows = kOcBlocks * kIcBlocks, kFilterRows = 3;
  int64_t lanes, oc_block, row_pitch, reach, channels = kOcBlocks * oc_block;
  IndexOrder order;
  std::vector<int32_t> row_offsets{0}, input_offsets, column_splits, filter_row_starts;
  std::vector<float> values, input;

  WeightsAndInput(const Kernels& kernels, int64_t oc_block_, int cols, IndexOrder order_ = IndexOrder::any,
                  bool reversed = false)
      : lanes(kernels.lanes),
        oc_block(oc_block_),
        row_pitch((cols + 3) * lanes),
        reach((kTileVectors / cols - 1) * row_pitch + cols * lanes),
        order(order_) {
    if (order == IndexOrder::by_column)
      fill_by_column(cols);
    else
      fill_any_or_triples(reversed);
    for (int64_t row = 0; row < kRows; ++row) {
      const int32_t count = row_offsets[row + 1] - row_offsets[row];
      for (int32_t r = 0; r <= kFilterRows; ++r) filter_row_starts.push_back(count * r / kFilterRows);
    }
  }

  PackedWeights packed() const {
    return {.oc_block = oc_block,
            .oc_blocks = kOcBlocks,
            .ic_blocks = kIcBlocks,
            .row_offsets = row_offsets.data(),
            .input_offsets = input_offsets.data(),
            .values = values.data(),
            .order = order,
            .column_splits = column_splits.data(),
            .filter_row_starts = filter_row_starts.data(),
            .filter_rows = kFilterRows};
  }

  // What column index i reads at element `at` of the tile.
  float source(int32_t i, int64_t at, int cols) const {
    return input[input_offsets[i] + at / (cols * lanes) * row_pitch + at % (cols * lanes)];
  }

  double sum(int64_t channel, int64_t at, int cols, FilterRows inside = {.begin = 0, .end = kFilterRows}) const {
    double sum = 0;
    for (int64_t ic_block = 0; ic_block < kIcBlocks; ++ic_block) {
      const int64_t row = ic_block * kOcBlocks + channel / oc_block;
      const int32_t* const starts = filter_row_starts.data() + row * (kFilterRows + 1);
      for (int32_t i = row_offsets[row] + starts[inside.begin]; i < row_offsets[row] + starts[inside.end]; ++i)
        sum += static_cast<double>(values[i * oc_block + channel % oc_block]) * source(i, at, cols);
    }
    return sum;
  }

 private:
  void fill_any_or_triples(bool reversed) {
    const int64_t largest = 5 * row_pitch, step = order == IndexOrder::width_triples ? 1 : lanes;
    // Width-vectorised triples read the vectors on both sides of their middle column.
    const int64_t lead = order == IndexOrder::width_triples ? lanes - 1 : 0;
    const bool triples = order != IndexOrder::any;
    const auto push = [&](int64_t offset) {
      for (int i = 0; i < (triples ? 3 : 1); ++i)
        input_offsets.push_back(static_cast<int32_t>(lead + offset + (reversed ? 2 - i : i) * step));
    };
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t count = row == 1 ? 0 : below(4 * lanes); count > 0; --count) push(below(largest));
      if (row + 1 == kRows) push(largest);
      row_offsets.push_back(static_cast<int32_t>(input_offsets.size()));
    }
    values = numbers(std::ssize(input_offsets) * oc_block);
    input = numbers(largest + reach + (triples ? 2 * lanes : 0));
  }

  void fill_by_column(int cols) {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t column : {-1, 0, 1}) {
        if (column > -1) column_splits.push_back(static_cast<int32_t>(std::ssize(input_offsets) - row_offsets.back()));
        for (int64_t count = row == 1 ? 0 : below(lanes); count > 0; --count)
          input_offsets.push_back(static_cast<int32_t>(below(6) * row_pitch + lanes + column));
      }
      row_offsets.push_back(static_cast<int32_t>(input_offsets.size()));
    }
    values = numbers(std::ssize(input_offsets));
    input = numbers(5 * row_pitch + reach + 2 * lanes);
    for (int64_t at = lanes; at < std::ssize(input); at += row_pitch)
      for (int64_t beside : {at - 1, at + cols * lanes})
        if (beside < std::ssize(input)) input[beside] = 0;
  }
};

}  // namespace

// `filter_rows` has one for each vector, or is null: the tile leaves out the others.
static bool check_accumulators(const Kernels& kernels, const WeightsAndInput& weights, int cols,
                               const FilterRows* filter_rows = nullptr) {
  const int64_t lanes = kernels.lanes, row_pitch = (cols + 1) * lanes, plane = kTileVectors / cols * row_pitch;
  std::vector<float> accumulators((weights.channels - 1) * plane + plane - lanes, kUntouched);
  // The first oc_block by itself, then the others.
  for (int64_t ic_block = 0; ic_block < WeightsAndInput::kIcBlocks; ++ic_block)
    for (Range oc_blocks : {Range{0, 1}, Range{1, WeightsAndInput::kOcBlocks}})
      kernels.conv_tile(weights.packed(), {ic_block, ic_block + 1},
                        {.cols = cols,
                         .rows_inside = kTileVectors,
                         .cols_inside = kTileVectors,
                         .input = weights.input.data(),
                         .input_row_pitch = weights.row_pitch,
                         .accumulators = accumulators.data(),
                         .acc_row_pitch = row_pitch,
                         .acc_channel_pitch = plane,
                         .output = nullptr,
                         .oc_blocks = oc_blocks,
                         .filter_rows = filter_rows});

  std::vector<double> expected(accumulators.size(), kUntouched);
  for (int64_t k = 0; k < weights.channels; ++k)
    for (int64_t at = 0; at < kTileVectors * lanes; ++at) {
      const int64_t row = at / (cols * lanes);
      expected[k * plane + row * row_pitch + at % (cols * lanes)] =
          filter_rows ? weights.sum(k, at, cols, filter_rows[row]) : weights.sum(k, at, cols);
    }
  return equal(accumulators, expected);
}

// The last two channels are swapped, the first one is beyond its group, and the image ends within the tile.
static bool check_output(const Kernels& kernels, const WeightsAndInput& weights, int cols, Activation activation) {
  const int64_t lanes = kernels.lanes, tile_rows = kTileVectors / cols, row_size = cols * lanes - lanes / 2;
  const int64_t plane = tile_rows * row_size;
  std::vector<int32_t> channel_of(weights.channels);
  for (int64_t k = 0; k < weights.channels; ++k) channel_of[k] = static_cast<int32_t>(k);
  std::swap(channel_of[weights.channels - 1], channel_of[weights.channels - 2]);
  channel_of[0] = -1;
  std::vector<float> accumulators(weights.channels * kTileVectors * lanes);
  std::vector<float> output(weights.channels * plane, kUntouched);
  const std::vector<float> affine = numbers(weights.channels), residual = numbers(std::ssize(output));
  OutputRegion region{.data = output.data(),
                      .row_pitch = row_size,
                      .channel_pitch = plane,
                      .rows = std::max<int64_t>(1, tile_rows - 1),
                      .cols = row_size,
                      .first_col = 0,
                      .gate_channel_pitch = tile_rows * ((row_size + 7) / 8),
                      .channel_of = channel_of.data(),
                      .epilogue = {}};
  if (activation != Activation::none)
    region.epilogue = {.scale = affine.data(), .bias = affine.data(), .residual = residual.data()};
  Gates gates(activation, std::ssize(output), row_size, std::ssize(output));
  gates.activate(region.epilogue);
  kernels.conv_tile(weights.packed(), {0, WeightsAndInput::kIcBlocks},
                    {.cols = cols,
                     .rows_inside = region.rows,
                     .cols_inside = cols,
                     .input = weights.input.data(),
                     .input_row_pitch = weights.row_pitch,
                     .accumulators = accumulators.data(),
                     .acc_row_pitch = cols * lanes,
                     .acc_channel_pitch = kTileVectors * lanes,
                     .output = &region,
                     .oc_blocks = {0, WeightsAndInput::kOcBlocks}});

  std::vector<double> expected(output.size(), kUntouched);
  for (int64_t k = 1; k < weights.channels; ++k)
    for (int64_t r = 0; r < region.rows; ++r)
      for (int64_t x = 0; x < row_size; ++x) {
        const int64_t at = channel_of[k] * plane + r * row_size + x;
        expected[at] = with_epilogue(region.epilogue, weights.sum(k, r * cols * lanes + x, cols), channel_of[k], at);
      }
  return equal(output, expected) && gates.fit(output);
}

bool check_conv_tile(const Kernels& kernels) {
  bool good = true;
  std::vector<FilterRows> filter_rows{{.begin = 1, .end = 3}, {.begin = 0, .end = 2}, {.begin = 0, .end = 0}};
  filter_rows.resize(kTileVectors, {.begin = 0, .end = 3});
  for (int cols : {16, 8, 4, 2, 1}) {
    std::vector<WeightsAndInput> cases;
    for (int64_t oc_block : {1, 2, 4}) cases.emplace_back(kernels, oc_block, cols);
    for (IndexOrder order : {IndexOrder::batch_triples, IndexOrder::width_triples})
      for (bool reversed : {false, true}) cases.emplace_back(kernels, 1, cols, order, reversed);
    cases.emplace_back(kernels, 1, cols, IndexOrder::by_column);
    for (const WeightsAndInput& weights : cases) {
      good &= check_accumulators(kernels, weights, cols);
      if (weights.oc_block > 1 && kernels.register_block_of_tile(cols, weights.oc_block).rows == 1)
        good &= check_accumulators(kernels, weights, cols, filter_rows.data());
      for (Activation activation : kActivations) good &= check_output(kernels, weights, cols, activation);
    }
  }
  return good;
}

static bool check_partials(const Kernels& kernels, const WeightsAndInput& weights, int cols) {
  const int64_t lanes = kernels.lanes, row_pitch = (cols + 1) * lanes, plane = kTileVectors / cols * row_pitch;
  std::vector<int32_t> channel_of(weights.channels);
  for (int64_t k = 0; k < weights.channels; ++k) channel_of[k] = static_cast<int32_t>(weights.channels - 1 - k);
  const std::vector<float> grad = numbers((weights.channels - 1) * plane + plane - lanes);
  std::vector<float> partials = numbers(weights.oc_block * std::ssize(weights.input_offsets));
  std::vector<double> expected(partials.begin(), partials.end());
  // The first oc_block by itself, then the others.
  for (Range oc_blocks : {Range{0, 1}, Range{1, WeightsAndInput::kOcBlocks}})
    kernels.grad_weight_tile(weights.packed(), {0, WeightsAndInput::kIcBlocks},
                             {.input = weights.input.data(),
                              .grad = grad.data(),
                              .input_row_pitch = weights.row_pitch,
                              .grad_row_pitch = row_pitch,
                              .grad_channel_pitch = plane,
                              .cols = cols,
                              .oc_blocks = oc_blocks,
                              .channel_of = channel_of.data()},
                             partials.data());

  for (int64_t row = 0; row < WeightsAndInput::kRows; ++row)
    for (int32_t i = weights.row_offsets[row]; i < weights.row_offsets[row + 1]; ++i)
      for (int64_t j = 0; j < weights.oc_block; ++j) {
        const int32_t k = channel_of[row % WeightsAndInput::kOcBlocks * weights.oc_block + j];
        for (int64_t at = 0; at < kTileVectors * lanes; ++at)
          expected[i * weights.oc_block + j] +=
              static_cast<double>(grad[k * plane + at / (cols * lanes) * row_pitch + at % (cols * lanes)]) *
              weights.source(i, at, cols);
      }
  return equal(partials, expected);
}

bool check_grad_weight_tile(const Kernels& kernels) {
  bool good = true;
  for (int cols : {16, 8, 4, 2, 1}) {
    for (int64_t oc_block : {1, 2, 4}) good &= check_partials(kernels, WeightsAndInput(kernels, oc_block, cols), cols);
    good &= check_partials(kernels, WeightsAndInput(kernels, 1, cols, IndexOrder::by_column), cols);
  }
  return good;
}

bool check_col_indices(const Kernels& kernels) {
  const int64_t channels = 7, taps = 9, count = 37, channel_pitch = 100;
  std::vector<int32_t> tap_offset(taps), indices(count), offsets(count);
  for (int64_t tap = 0; tap < taps; ++tap) tap_offset[tap] = static_cast<int32_t>(10 * tap);
  for (int32_t& index : indices) index = static_cast<int32_t>(below(channels) << kTapBits | below(taps));
  kernels.col_indices_to_offsets(indices.data(), count, 3, channel_pitch, tap_offset.data(), offsets.data());
  bool good = kernels.col_indices_inside(indices.data(), count, channels, taps);
  for (int64_t i = 0; i < count; ++i)
    good &= offsets[i] == (indices[i] >> kTapBits & 3) * channel_pitch + 10 * (indices[i] & (kMaxTaps - 1));
  for (int64_t outside : {channels << kTapBits, taps, int64_t{-1}})
    for (int64_t at : {int64_t{0}, count - 1}) {
      std::vector<int32_t> wrong = indices;
      wrong[at] = static_cast<int32_t>(outside);
      good &= !kernels.col_indices_inside(wrong.data(), count, channels, taps);
    }
  std::vector<int32_t> triples;
  for (int32_t row : {0, 2, 1})
    for (int32_t tap = 0; tap < 3; ++tap) triples.push_back(4 << kTapBits | (3 * row + tap));
  good &= kernels.col_indices_in_triples(triples.data(), 9) && !kernels.col_indices_in_triples(triples.data(), 8) &&
          !kernels.col_indices_in_triples(triples.data() + 1, 6);
  std::swap(triples[7], triples[8]);
  good &= !kernels.col_indices_in_triples(triples.data(), 9);

  // Rows of 37, 0 and 1 column indices; filter rows of 2 taps, the last of which has none.
  std::ranges::sort(indices, {}, [](int32_t index) { return (index & (kMaxTaps - 1)) / 2; });
  indices.push_back(2 << kTapBits | 3);
  const std::vector<int32_t> row_offsets{0, 37, 37, 38};
  std::vector<int32_t> starts(3 * 7, -1);
  const auto find = [&](int64_t begin, int64_t end) {
    return kernels.find_filter_rows(indices.data(), row_offsets.data(), {begin, end}, 6, 2, starts.data());
  };
  good &= find(0, 2) && starts[14] == -1 && find(2, 3);
  for (int64_t row = 0; row < 3; ++row)
    for (int64_t r = 0; r <= 6; ++r)
      good &= starts[row * 7 + r] == std::count_if(indices.begin() + row_offsets[row],
                                                   indices.begin() + row_offsets[row + 1],
                                                   [&](int32_t index) { return (index & (kMaxTaps - 1)) / 2 < r; });
  std::swap(indices[0], indices[36]);
  return good && !find(0, 3);
}

}  // namespace sparse_adv
