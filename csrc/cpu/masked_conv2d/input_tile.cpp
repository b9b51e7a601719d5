#include "cpu/masked_conv2d/input_tile.h"

#include <algorithm>

#include "common/layout.h"

namespace sparse_adv {

using torch::stable::Tensor;

Images images_of(const Tensor& tensor, const Blocking& blocking, int64_t work_item) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  const int64_t first = work_item / blocking.bands * blocking.batch_block;
  return {.data = tensor.const_data_ptr<float>() + first * channels * pixels,
          .image_size = channels * pixels,
          .channels = channels,
          .pixels = pixels,
          .channels_last = is_channels_last(tensor),
          .count = static_cast<int>(std::min(blocking.batch_block, tensor.size(0) - first))};
}

void InputTileLoader::start_band(int64_t band, const Images& images) {
  images_ = images;
  if (blocking_.width_vectorised())
    map_rows(band);
  else
    map_pixels(band);
}

void InputTileLoader::fill(int64_t first_channel, float* tile) const {
  const Range channels{.begin = first_channel, .end = first_channel + blocking_.slice_channels(first_channel)};
  if (blocking_.width_vectorised())
    SPARSE_ADV_CHOOSE(fill_width_tile)(images_.data, images_.pixels, row_map_, channels, tile + blocking_.row_lead);
  else
    SPARSE_ADV_CHOOSE(fill_batch_tile)(images_, pixel_map_, channels, tile);
}

// Rows and columns of source phases that no tap reads, half of them for 1x1 filters at stride 2, are neither moved nor
// set to 0.
void InputTileLoader::map_pixels(int64_t band) {
  const ConvAxis& rows = blocking_.rows;
  const ConvAxis& cols = blocking_.cols;
  const int64_t phase_rows = blocking_.band_rows + rows.max_shift;
  const int64_t start =
      band * blocking_.band_rows * rows.source_phases - rows.pad;  // source row of the tile's first row
  const int64_t first = std::clamp<int64_t>(start, 0, rows.source_size);
  const int64_t last = std::clamp<int64_t>(start + phase_rows * rows.source_phases, first, rows.source_size);
  positions_.assign((last - first) * cols.source_size, -1);
  const std::vector<bool> row_phase_is_read = rows.phases_read(), col_phase_is_read = cols.phases_read();
  std::vector<bool> filled(blocking_.channel_pitch);
  bool skipped = false;
  for (int64_t y = first; y < last; ++y) {
    const int64_t phase = (y - start) % rows.source_phases;
    if (!row_phase_is_read[phase]) continue;
    const int64_t tile_row = (phase * phase_rows + (y - start) / rows.source_phases) * blocking_.row_pitch;
    for (int64_t x = 0; x < cols.source_size; ++x) {
      const int64_t u = x + cols.pad;
      if (u < 0 || u / cols.source_phases >= blocking_.phase_cols || !col_phase_is_read[u % cols.source_phases]) {
        skipped = true;
        continue;
      }
      const int64_t position = tile_row + u % cols.source_phases * blocking_.phase_cols + u / cols.source_phases;
      positions_[(y - first) * cols.source_size + x] = static_cast<int32_t>(position);
      filled[position] = true;
    }
  }
  zero_positions_.clear();
  for (int64_t i = 0; i < blocking_.channel_pitch; ++i) {
    const int64_t row = i / blocking_.row_pitch, col = i % blocking_.row_pitch;
    if (!filled[i] && row_phase_is_read[row / phase_rows] && col_phase_is_read[col / blocking_.phase_cols])
      zero_positions_.push_back(static_cast<int32_t>(i));
  }
  pixel_map_ = {.first_pixel = first * cols.source_size,
                .pixel_count = std::ssize(positions_),
                .positions = positions_.data(),
                .zero_positions = zero_positions_.data(),
                .zero_count = std::ssize(zero_positions_),
                .channel_pitch = blocking_.channel_pitch,
                .ascending = !skipped && rows.source_phases == 1 && cols.source_phases == 1};
}

void InputTileLoader::map_rows(int64_t band) {
  const ConvAxis& rows = blocking_.rows;
  const ConvAxis& cols = blocking_.cols;
  const int64_t lanes = blocking_.lanes, phase_rows = blocking_.band_rows + rows.max_shift;
  const int64_t start =
      band * blocking_.band_rows * rows.source_phases - rows.pad;  // source row of the tile's first row
  const int64_t first = std::clamp<int64_t>(start, 0, rows.source_size);
  const int64_t last = std::clamp<int64_t>(start + phase_rows * rows.source_phases, first, rows.source_size);
  const std::vector<bool> row_phase_is_read = rows.phases_read();
  const auto offset_of = [&](int64_t row, int64_t col_phase) {
    const int64_t phase = row % rows.source_phases * cols.source_phases + col_phase;
    return static_cast<int32_t>(phase * blocking_.phase_pitch * lanes +
                                row / rows.source_phases * blocking_.row_stride());
  };
  const int64_t phase_of_first_pixel = cols.pad % cols.source_phases;
  offsets_.clear();
  zero_offsets_.clear();
  for (int64_t row = 0; row < phase_rows * rows.source_phases; ++row) {
    const bool inside = start + row >= first && start + row < last,
               is_read = row_phase_is_read[row % rows.source_phases];
    if (inside) offsets_.push_back(is_read ? offset_of(row, phase_of_first_pixel) : -1);
    for (int64_t phase = 0; !inside && is_read && phase < cols.source_phases; ++phase)
      zero_offsets_.push_back(offset_of(row, phase));
  }
  row_map_ = {.row_size = cols.source_size,
              .last_row_size = blocking_.cols_in_row(last - 1, cols.source_size),
              .first_pixel = first * cols.source_size,
              .row_count = last - first,
              .offsets = offsets_.data(),
              .zero_offsets = zero_offsets_.data(),
              .zero_count = std::ssize(zero_offsets_),
              .tile_row_size = blocking_.in_segments()  ? kTileVectors * lanes
                               : blocking_.joins_rows() ? blocking_.padded_joined_pitch()
                                                        : blocking_.row_pitch * lanes - blocking_.row_lead,
              .channel_pitch = blocking_.channel_pitch * lanes};
  // The second pixel belongs to the other phase: to the next position of it if that is the first phase.
  if (cols.source_phases == 2)
    row_map_.odd_offset = offset_of(0, 1) * (phase_of_first_pixel ? -1 : 1) + phase_of_first_pixel;
}

void GradTileLoader::fill(const Images& grads, int64_t band, Range channels, float* tile) {
  tile += channels.begin * channel_pitch * blocking_.lanes;
  if (blocking_.width_vectorised())
    SPARSE_ADV_CHOOSE(fill_width_tile)(grads.data, grads.pixels, map_rows(band), channels, tile);
  else
    SPARSE_ADV_CHOOSE(fill_batch_tile)(grads, map_pixels(band), channels, tile);
}

RowMap GradTileLoader::map_rows(int64_t band) {
  const int64_t last = band * blocking_.band_rows + blocking_.rows_in_band(band) - 1, lanes = blocking_.lanes;
  const int64_t stride = blocking_.joins_rows() ? blocking_.joined_pitch : row_pitch * lanes;
  positions_.clear();
  zero_positions_.clear();
  for (int64_t row = 0; row < blocking_.band_rows; ++row)
    (row < blocking_.rows_in_band(band) ? positions_ : zero_positions_).push_back(static_cast<int32_t>(row * stride));
  return {.row_size = blocking_.cols.output_size,
          .last_row_size = blocking_.cols_in_row(last, blocking_.cols.output_size),
          .first_pixel = band * blocking_.band_rows * blocking_.cols.output_size,
          .row_count = blocking_.rows_in_band(band),
          .offsets = positions_.data(),
          .zero_offsets = zero_positions_.data(),
          .zero_count = std::ssize(zero_positions_),
          .tile_row_size = blocking_.joins_rows() ? blocking_.padded_joined_pitch() : blocking_.row_vectors * lanes,
          .channel_pitch = channel_pitch * lanes};
}

PixelMap GradTileLoader::map_pixels(int64_t band) {
  const int64_t cols = blocking_.cols.positions, rows = blocking_.rows_in_band(band);
  positions_.clear();
  zero_positions_.clear();
  for (int64_t i = 0; i < channel_pitch; ++i) {
    const bool inside = i / blocking_.row_vectors < rows && i % blocking_.row_vectors < cols;
    (inside ? positions_ : zero_positions_).push_back(static_cast<int32_t>(i));
  }
  return {.first_pixel = band * blocking_.band_rows * cols,
          .pixel_count = rows * cols,
          .positions = positions_.data(),
          .zero_positions = zero_positions_.data(),
          .zero_count = std::ssize(zero_positions_),
          .channel_pitch = channel_pitch,
          .ascending = true};
}

}  // namespace sparse_adv
