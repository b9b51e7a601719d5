#include "cpu/masked_conv2d/sparse.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/errors.h"
#include "common/layout.h"
#include "cpu/aligned_buffer.h"
#include "cpu/masked_conv2d/batch_layout_kernel.h"
#include "cpu/masked_conv2d/conv_kernel.h"
#include "cpu/masked_conv2d/input_tile.h"

namespace sparse_adv {

using torch::stable::Tensor;

namespace {

// The lists of one output phase with offsets into the window, and values in the same order.
struct PhaseLists {
  std::vector<int32_t> rows, turns;
  std::unique_ptr<int32_t[]> offsets;
  std::unique_ptr<float[]> values;
  OffsetLists view;
};

std::unique_ptr<float[]> packed_values(const SparsePass& pass) {
  auto values = std::make_unique_for_overwrite<float[]>(pass.lists.entry_count * pass.lists.vector);
  pack_values(pass.lists, pass.groups, pass.group_rows, pass.weight, values.get());
  return values;
}

// All taps are of the one phase.
void make_single_phase(const SparsePass& pass, PhaseLists& phase) {
  const PatternLists& lists = pass.lists;
  phase.offsets = window_offsets(lists, pass.window);
  const float* values = lists.values;
  if (!values) {
    phase.values = packed_values(pass);
    values = phase.values.get();
  }
  phase.view = {lists.vector,
                lists.vectors,
                lists.segments,
                lists.rows,
                phase.offsets.get(),
                values,
                lists.rows_of_three ? pass.window.columns_of_threes() : Columns::any,
                nullptr};
  if (lists.rows_of_three || !pass.window.sorts_by_column(lists.vector)) return;
  const ColumnOrder order(lists, pass.window);
  auto sorted_offsets = std::make_unique_for_overwrite<int32_t[]>(lists.entry_count);
  auto sorted_values = std::make_unique_for_overwrite<float[]>(lists.entry_count);
  parallel_for(0, lists.entry_count, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sorted_offsets[order.place[i]] = phase.offsets[i];
      sorted_values[order.place[i]] = values[i];
    }
  });
  phase.offsets = std::move(sorted_offsets);
  phase.values = std::move(sorted_values);
  phase.turns = order.turns;
  phase.view.offsets = phase.offsets.get();
  phase.view.values = phase.values.get();
  phase.view.columns = Columns::by_column;
  phase.view.turns = phase.turns.data();
}

void make_phase(const SparsePass& pass, int64_t index, const float* all_values, PhaseLists& phase) {
  const PatternLists& lists = pass.lists;
  const auto taps = static_cast<int64_t>(pass.weight.tap_offset.size());
  std::vector<int64_t> tap_offset(taps);
  for (int64_t tap = 0; tap < taps; ++tap) tap_offset[tap] = pass.window.tap_offset(tap, index);
  int64_t count = 0;
  for (int64_t i = 0; i < lists.entry_count; ++i) count += tap_offset[lists.entries[i] & (kMaxTaps - 1)] >= 0;
  phase.offsets = std::make_unique_for_overwrite<int32_t[]>(count);
  phase.values = std::make_unique_for_overwrite<float[]>(count * lists.vector);
  int32_t next = 0;
  phase.rows.push_back(0);
  for (int64_t list = 0; list < lists.vectors * lists.segments; ++list) {
    for (int32_t i = lists.rows[list]; i < lists.rows[list + 1]; ++i) {
      const int64_t offset = tap_offset[lists.entries[i] & (kMaxTaps - 1)];
      if (offset < 0) continue;
      const int64_t channel = lists.entries[i] >> kTapBits;
      phase.offsets[next] = static_cast<int32_t>(channel * pass.window.plane * pass.window.lanes + offset);
      std::copy_n(all_values + i * lists.vector, lists.vector, phase.values.get() + next * lists.vector);
      ++next;
    }
    phase.rows.push_back(next);
  }
  phase.view = {lists.vector,        lists.vectors,      lists.segments, phase.rows.data(),
                phase.offsets.get(), phase.values.get(), Columns::any,   nullptr};
}

std::vector<PhaseLists> make_phases(const SparsePass& pass) {
  std::vector<PhaseLists> phases(pass.window.phases());
  if (phases.size() == 1) {
    make_single_phase(pass, phases[0]);
    return phases;
  }
  const std::unique_ptr<float[]> packed = pass.lists.values ? nullptr : packed_values(pass);
  const float* values = pass.lists.values ? pass.lists.values : packed.get();
  for (size_t i = 0; i < phases.size(); ++i) make_phase(pass, static_cast<int64_t>(i), values, phases[i]);
  return phases;
}

// The plane of sums of each output channel: vectors may reach beyond the end of their group.
std::vector<int32_t> planes_of_channels(const SparsePass& pass) {
  const int64_t padded = (pass.group_rows + pass.lists.vector - 1) / pass.lists.vector * pass.lists.vector;
  std::vector<int32_t> planes;
  for (int64_t group = 0; group < pass.groups; ++group)
    for (int64_t row = 0; row < pass.group_rows; ++row) planes.push_back(static_cast<int32_t>(group * padded + row));
  return planes;
}

// Lane = sample: which pixels of the output the strip's sums are, and the place of each in a plane; the rest of `Sums`
// is left empty.
Sums sums_of_strip(const Window& window, int64_t strip, std::vector<int32_t>& sums_place) {
  const Axis& rows = window.rows;
  const Axis& cols = window.cols;
  const int64_t top = strip * window.strip * rows.output_phases;
  const int64_t bottom = std::min(top + window.strip * rows.output_phases, rows.output_size);
  const int64_t phase_size = window.strip * window.sums_row_pitch;
  sums_place.clear();
  for (int64_t y = top; y < bottom; ++y)
    for (int64_t x = 0; x < cols.output_size; ++x) {
      const int64_t phase = y % rows.output_phases * cols.output_phases + x % cols.output_phases;
      const int64_t row = (y - top) / rows.output_phases, col = x / cols.output_phases;
      sums_place.push_back(static_cast<int32_t>(phase * phase_size + row * window.sums_row_pitch + col));
    }
  return {nullptr, nullptr, window.sums_plane, top * cols.output_size, std::ssize(sums_place), sums_place.data()};
}

// One strip: its window is filled block by block of channels, and each block added to the sums.
class Strip {
 public:
  Strip(const SparsePass& pass, const std::vector<PhaseLists>& phases, const std::vector<int32_t>& channel_of,
        Tensor& output)
      : pass_(pass),
        window_(pass.window),
        phases_(phases),
        channel_of_(channel_of),
        plane_of_(planes_of_channels(pass)),
        output_(output),
        planes_(pass.lists.vectors * pass.lists.vector),
        scratch_(thread_buffer().at_least(window_.block_size() + window_.sums_size(planes_) * window_.lanes)),
        sums_(scratch_ + window_.block_size()) {
    if (window_.lane_is_pixel) std::fill_n(scratch_, window_.block_size(), 0.0f);
  }

  void run(int64_t item) {
    const int64_t strip = item % window_.strips;
    const Filler filler(window_, placement_, strip, images_of(pass_.source, window_, item));
    const Images shape = images_of(output_, window_, item);
    const int64_t at = shape.data - output_.const_data_ptr<float>();
    float* const output = output_.mutable_data_ptr<float>() + at;
    Epilogue epilogue = pass_.epilogue;
    if (epilogue.residual) epilogue.residual += at;
    for (int64_t first = 0; first < window_.channels; first += window_.block) {
      filler.fill(first, scratch_);
      if (window_.lane_is_pixel)
        compute_rows(strip, first, epilogue, shape, output);
      else
        compute_sums(strip, first);
    }
    if (window_.lane_is_pixel) return;
    Sums sums = sums_of_strip(window_, strip, sums_place_);
    sums.data = sums_;
    sums.plane_of = plane_of_.data();
    SPARSE_ADV_CHOOSE(store_sums)(sums, epilogue, shape, output);
  }

 private:
  static AlignedBuffer& thread_buffer() {
    thread_local AlignedBuffer buffer;
    return buffer;
  }

  void convolve(const OffsetLists& lists, int64_t first_segment, int64_t last_segment, const Tile& tile) const {
    SPARSE_ADV_CHOOSE(masked_conv2d_tile)(lists, first_segment, last_segment, tile);
  }

  template <class Visit>
  void for_each_tile(int64_t strip, const Visit& visit) const {
    const int64_t lanes = window_.lanes, strip_rows = window_.rows_of(strip);
    for (int64_t row = 0; row < strip_rows; row += window_.tile_rows)
      for (int64_t col = 0; col < window_.across; col += window_.tile_cols)
        visit(row, col,
              {window_.tile_cols, scratch_ + (row * window_.row_pitch + col) * lanes, window_.row_pitch * lanes,
               sums_ + window_.sums_at(row, col, planes_) * lanes, window_.sums_row_pitch * lanes,
               window_.sums_plane * lanes, nullptr});
  }

  // Lane = sample: the sums of all phases stay in the scratch memory.
  void compute_sums(int64_t strip, int64_t first_channel) const {
    const Segments segments = segments_of_block(pass_.lists, window_, first_channel);
    const int64_t phase_size = window_.strip * window_.sums_row_pitch * window_.lanes;
    for (int64_t phase = 0; phase < window_.phases(); ++phase)
      for_each_tile(strip, [&](int64_t, int64_t, Tile tile) {
        tile.sums += phase * phase_size;
        convolve(phases_[phase].view, segments.first, segments.last, tile);
      });
  }

  // Lane = pixel: the last block of channels takes the sums to the output.
  void compute_rows(int64_t strip, int64_t first_channel, const Epilogue& epilogue, const Images& shape,
                    float* output) const {
    const OffsetLists& lists = phases_[0].view;
    const Segments segments = segments_of_block(pass_.lists, window_, first_channel);
    const int64_t width = window_.cols.output_size;
    for_each_tile(strip, [&](int64_t row, int64_t col, Tile tile) {
      const int64_t at = (strip * window_.strip + row) * width + col * window_.lanes;
      TileOutput to{
          output + at,        width,   shape.pixels, window_.rows_of(strip) - row, width - col * window_.lanes,
          channel_of_.data(), epilogue};
      if (epilogue.residual) to.epilogue.residual += at;
      tile.output = &to;
      convolve(lists, segments.first, segments.last, tile);
    });
  }

  const SparsePass& pass_;
  const Window& window_;
  const std::vector<PhaseLists>& phases_;
  const std::vector<int32_t>& channel_of_;
  const std::vector<int32_t> plane_of_;
  Tensor& output_;
  const int64_t planes_;
  float* const scratch_;
  float* const sums_;
  StripPlacement placement_;
  std::vector<int32_t> sums_place_;
};

}  // namespace

void run(const SparsePass& pass, Tensor& output) {
  const std::vector<PhaseLists> phases = make_phases(pass);
  const std::vector<int32_t> channel_of = channels_of_rows(pass.lists, pass.groups, pass.group_rows);
  parallel_for(0, pass.window.items(), 1, [&](int64_t begin, int64_t end) {
    Strip strip(pass, phases, channel_of, output);
    for (int64_t item = begin; item < end; ++item) strip.run(item);
  });
}

}  // namespace sparse_adv
