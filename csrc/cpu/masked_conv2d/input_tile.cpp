#include "cpu/masked_conv2d/input_tile.h"

#include <algorithm>

#include "common/layout.h"

namespace sparse_adv {

using torch::stable::Tensor;

Images images_of(const Tensor& tensor, const Window& window, int64_t item) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  const int64_t first = item / window.strips * window.images;
  return {tensor.const_data_ptr<float>() + first * channels * pixels,
          channels * pixels,
          channels,
          pixels,
          is_channels_last(tensor),
          static_cast<int>(std::min(window.images, tensor.size(0) - first))};
}

Placement StripPlacement::samples(const Window& window, int64_t strip) {
  const Axis& rows = window.rows;
  const Axis& cols = window.cols;
  const int64_t window_rows = window.strip + rows.max_shift;
  const int64_t start = strip * window.strip * rows.source_phases - rows.pad;  // source row of window row 0
  const int64_t first = std::clamp<int64_t>(start, 0, rows.source_size);
  const int64_t last = std::clamp<int64_t>(start + window_rows * rows.source_phases, first, rows.source_size);
  place.assign((last - first) * cols.source_size, -1);
  // Rows and columns that no tap reads, as half of them with one tap at stride 2, are left as they are.
  const std::vector<bool> row_is_read = rows.phases_read(), col_is_read = cols.phases_read();
  std::vector<bool> filled(window.plane);
  bool skipped = false;
  for (int64_t y = first; y < last; ++y) {
    if (!row_is_read[(y - start) % rows.source_phases]) continue;
    const int64_t row =
        ((y - start) % rows.source_phases * window_rows + (y - start) / rows.source_phases) * window.row_pitch;
    for (int64_t x = 0; x < cols.source_size; ++x) {
      const int64_t u = x + cols.pad;
      if (u < 0 || u / cols.source_phases >= window.window_cols || !col_is_read[u % cols.source_phases]) {
        skipped = true;
        continue;
      }
      const int64_t at = row + u % cols.source_phases * window.window_cols + u / cols.source_phases;
      place[(y - first) * cols.source_size + x] = static_cast<int32_t>(at);
      filled[at] = true;
    }
  }
  gaps.clear();
  for (int64_t i = 0; i < window.plane; ++i) {
    const int64_t row = i / window.row_pitch, col = i % window.row_pitch;
    if (!filled[i] && row_is_read[row / window_rows] && col_is_read[col / window.window_cols])
      gaps.push_back(static_cast<int32_t>(i));
  }
  return {first * cols.source_size,
          static_cast<int64_t>(place.size()),
          place.data(),
          gaps.data(),
          static_cast<int64_t>(gaps.size()),
          window.plane,
          !skipped && rows.source_phases == 1 && cols.source_phases == 1};
}

Filler::Filler(const Window& window, StripPlacement& buffers, int64_t strip, const Images& images)
    : window_(window), images_(images), samples_{}, pixels_{} {
  if (!window.lane_is_pixel) {
    samples_ = buffers.samples(window, strip);
    return;
  }
  const int64_t start = strip * window.strip - window.rows.pad, rows = window.strip + window.rows.max_shift;
  const int64_t first = std::clamp<int64_t>(start, 0, window.rows.source_size);
  const int64_t last = std::clamp<int64_t>(start + rows, first, window.rows.source_size);
  const int64_t lanes = window.lanes;
  pixels_ = {window.cols.source_size,
             first,
             last - first,
             first - start,
             rows,
             window.row_pitch * lanes - window.lead,
             window.row_pitch * lanes,
             window.plane * lanes};
}

void Filler::fill(int64_t first_channel, float* to) const {
  const int64_t end = first_channel + window_.block_channels(first_channel);
  if (window_.lane_is_pixel)
    SPARSE_ADV_CHOOSE(fill_rows)(images_.data, images_.pixels, pixels_, first_channel, end, to + window_.lead);
  else
    SPARSE_ADV_CHOOSE(fill_window)(images_, samples_, first_channel, end, to);
}

void GradFiller::fill(const Images& grads, int64_t strip, float* to) {
  if (window_.lane_is_pixel)
    SPARSE_ADV_CHOOSE(fill_rows)(grads.data, grads.pixels, pixels(strip), 0, grads.channels, to);
  else
    SPARSE_ADV_CHOOSE(fill_window)(grads, samples(strip), 0, grads.channels, to);
}

RowPlacement GradFiller::pixels(int64_t strip) const {
  const int64_t pitch = window_.across * window_.lanes;
  return {window_.cols.output_size, strip * window_.strip, window_.rows_of(strip), 0, window_.strip, pitch, pitch,
          plane * window_.lanes};
}

Placement GradFiller::samples(int64_t strip) {
  const int64_t cols = window_.cols.extent, count = window_.rows_of(strip);
  place_.clear();
  gaps_.clear();
  for (int64_t at = 0; at < plane; ++at) {
    const bool inside = at / window_.across < count && at % window_.across < cols;
    (inside ? place_ : gaps_).push_back(static_cast<int32_t>(at));
  }
  return {strip * window_.strip * cols,       count * cols, place_.data(), gaps_.data(),
          static_cast<int64_t>(gaps_.size()), plane,        true};
}

}  // namespace sparse_adv
