#include "cpu/sparse_pass.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/aligned_buffer.h"
#include "cpu/masked_conv2d_kernel.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

std::vector<int64_t> tap_offsets(const Tensor& weight) {
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r < weight.size(2); ++r)
    for (int64_t s = 0; s < weight.size(3); ++s) offsets.push_back(r * weight.stride(2) + s * weight.stride(3));
  return offsets;
}

// The lists of one output phase with offsets into the window, and values in the same order.
struct PhaseLists {
  std::vector<int32_t> rows, offsets;
  std::vector<float> values;
  OffsetLists view;
};

// All taps are of the one phase: lists stay as they are, offsets and values are made by all threads.
void make_single_phase(const SparsePass& pass, int lanes, PhaseLists& phase) {
  const PatternLists& lists = pass.lists;
  const auto taps = static_cast<int64_t>(pass.weight.tap_offset.size());
  std::vector<int32_t> tap_offset(taps);
  for (int64_t tap = 0; tap < taps; ++tap)
    tap_offset[tap] = static_cast<int32_t>(pass.window.tap_offset(tap, 0) * lanes);
  phase.offsets.resize(lists.entry_count);
  const auto plane = static_cast<int32_t>(pass.window.plane * lanes);
  torch::stable::parallel_for(0, lists.entry_count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      phase.offsets[i] = (lists.entries[i] >> kTapBits) * plane + tap_offset[lists.entries[i] & (kMaxTaps - 1)];
  });
  const float* values = lists.values;
  if (!values) {
    phase.values.resize(lists.entry_count * lists.vector);
    pack_values(lists, pass.groups, pass.group_rows, pass.weight, phase.values.data());
    values = phase.values.data();
  }
  phase.view = {lists.vector, lists.vectors, lists.segments, lists.rows, phase.offsets.data(), values};
}

void make_phase(const SparsePass& pass, int lanes, int64_t index, const float* all_values, PhaseLists& phase) {
  const PatternLists& lists = pass.lists;
  const auto taps = static_cast<int64_t>(pass.weight.tap_offset.size());
  std::vector<int64_t> tap_offset(taps);
  for (int64_t tap = 0; tap < taps; ++tap) tap_offset[tap] = pass.window.tap_offset(tap, index);
  phase.rows.push_back(0);
  for (int64_t list = 0; list < lists.vectors * lists.segments; ++list) {
    for (int32_t i = lists.rows[list]; i < lists.rows[list + 1]; ++i) {
      const int64_t offset = tap_offset[lists.entries[i] & (kMaxTaps - 1)];
      if (offset < 0) continue;
      const int64_t channel = lists.entries[i] >> kTapBits;
      phase.offsets.push_back(static_cast<int32_t>((channel * pass.window.plane + offset) * lanes));
      phase.values.insert(phase.values.end(), all_values + i * lists.vector, all_values + (i + 1) * lists.vector);
    }
    phase.rows.push_back(static_cast<int32_t>(phase.offsets.size()));
  }
  phase.view = {lists.vector,      lists.vectors,        lists.segments,
                phase.rows.data(), phase.offsets.data(), phase.values.data()};
}

std::vector<PhaseLists> make_phases(const SparsePass& pass, int lanes) {
  std::vector<PhaseLists> phases(pass.window.phases());
  if (phases.size() == 1) {
    make_single_phase(pass, lanes, phases[0]);
    return phases;
  }
  std::vector<float> packed;
  if (!pass.lists.values) {
    packed.resize(pass.lists.entry_count * pass.lists.vector);
    pack_values(pass.lists, pass.groups, pass.group_rows, pass.weight, packed.data());
  }
  const float* values = pass.lists.values ? pass.lists.values : packed.data();
  for (size_t i = 0; i < phases.size(); ++i) make_phase(pass, lanes, static_cast<int64_t>(i), values, phases[i]);
  return phases;
}

// Where each channel of the output lies in a tile: vectors may reach beyond the end of their group.
std::vector<int32_t> tile_rows_of_channels(const SparsePass& pass) {
  const int64_t padded = (pass.group_rows + pass.lists.vector - 1) / pass.lists.vector * pass.lists.vector;
  std::vector<int32_t> rows;
  for (int64_t group = 0; group < pass.groups; ++group)
    for (int64_t row = 0; row < pass.group_rows; ++row) rows.push_back(static_cast<int32_t>(group * padded + row));
  return rows;
}

}  // namespace

WeightLayout WeightLayout::forward(const Tensor& weight, const Pattern& pattern) {
  return {weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
          pattern.group_out_channels() * weight.stride(0) - pattern.group_in_channels * weight.stride(1),
          tap_offsets(weight)};
}

WeightLayout WeightLayout::grad_input(const Tensor& weight) {
  return {weight.const_data_ptr<float>(), weight.stride(1), weight.stride(0), 0, tap_offsets(weight)};
}

void pack_values(const PatternLists& lists, int64_t groups, int64_t group_rows, const WeightLayout& weight,
                 float* values) {
  const int64_t group_vectors = lists.vectors / groups;
  torch::stable::parallel_for(0, lists.vectors * lists.segments, 512, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list) {
      const int64_t group = list % lists.vectors / group_vectors;
      const int64_t row = list % lists.vectors % group_vectors * lists.vector;
      const float* base =
          weight.data + row * weight.row_stride + group * weight.group_stride;
      for (int64_t i = lists.rows[list]; i < lists.rows[list + 1]; ++i) {
        const int32_t entry = lists.entries[i];
        const float* from = base + (entry >> kTapBits) * weight.channel_stride +
                            weight.tap_offset[entry & (kMaxTaps - 1)];
        for (int64_t j = 0; j < lists.vector; ++j)
          values[i * lists.vector + j] = row + j < group_rows ? from[j * weight.row_stride] : 0.0f;
      }
    }
  });
}

Images images_of(const Tensor& tensor, int64_t first, int lanes) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  return {tensor.const_data_ptr<float>() + first * channels * pixels,
          channels * pixels,
          channels,
          pixels,
          is_channels_last(tensor),
          static_cast<int>(std::min<int64_t>(lanes, tensor.size(0) - first))};
}

void run(const SparsePass& pass, Tensor& output) {
  const int lanes = SPARSE_ADV_CHOOSE(lane_count)();
  const auto fill = SPARSE_ADV_CHOOSE(fill_window);
  const auto compute = SPARSE_ADV_CHOOSE(masked_conv2d_tile);
  const auto store = SPARSE_ADV_CHOOSE(store_tile);
  const Window& window = pass.window;
  const std::vector<PhaseLists> phases = make_phases(pass, lanes);
  const std::vector<int32_t> row_of = tile_rows_of_channels(pass);
  const int64_t window_size = window.channels * window.plane * lanes;
  const int64_t tile_size = pass.lists.vectors * pass.lists.vector * kTilePixels * lanes;
  const int64_t batches = (output.size(0) + lanes - 1) / lanes;
  float* const output_data = output.mutable_data_ptr<float>();

  torch::stable::parallel_for(0, batches * window.strips, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedBuffer buffer;
    float* const scratch = buffer.at_least(window_size + tile_size);
    float* const tile = scratch + window_size;
    StripPlacement placement;
    std::array<int32_t, kTilePixels> place;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / window.strips * lanes, strip = item % window.strips;
      fill(images_of(pass.source, first, lanes), placement.describe(window, strip), 0, window.channels, scratch);
      Images shape = images_of(output, first, lanes);
      Epilogue epilogue = pass.epilogue;
      if (epilogue.residual) epilogue.residual += first * shape.image_size;
      const int64_t end_row = std::min(window.strip, window.rows.extent - strip * window.strip);
      for (size_t phase = 0; phase < phases.size(); ++phase) {
        const int64_t row_phase = static_cast<int64_t>(phase) / window.cols.output_phases;
        const int64_t col_phase = static_cast<int64_t>(phase) % window.cols.output_phases;
        for (int64_t m = 0; m < end_row; m += window.tile_rows)
          for (int64_t l = 0; l < window.cols.extent; l += window.tile_cols) {
            bool inside = false;
            for (int q = 0; q < kTilePixels; ++q) {
              const int64_t y = window.rows.output(strip * window.strip + m + q / window.tile_cols, row_phase);
              const int64_t x = window.cols.output(l + q % window.tile_cols, col_phase);
              place[q] = y < 0 || x < 0 ? -1 : static_cast<int32_t>(y * window.cols.output_size + x);
              inside |= place[q] >= 0;
            }
            if (!inside) continue;
            compute(phases[phase].view, scratch + (m * window.row_pitch + l) * lanes, window.row_pitch * lanes,
                    window.tile_cols, tile);
            store({tile, row_of.data(), place.data()}, epilogue, shape, output_data + first * shape.image_size);
          }
      }
    }
  });
}

}  // namespace sparse_adv
