#include "cpu/window.h"

#include <algorithm>

namespace sparse_adv {

namespace {

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

}  // namespace

Axis Axis::forward(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
  Axis axis{source, output, stride, 1, output, padding, {}, 0, 0};
  for (int64_t t = 0; t < filter; ++t) {
    axis.taps.push_back({t * dilation % stride, 0, t * dilation / stride});
    axis.max_shift = std::max(axis.max_shift, axis.taps.back().shift);
  }
  return axis;
}

Axis Axis::grad_input(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                      int64_t dilation) {
  // Padded output coordinate y + padding = a + stride * m takes tap t where t * dilation % stride == a, from source row
  // m - t * dilation / stride. The first m that lies in the image is padding / stride.
  const int64_t first = padding / stride;
  const int64_t last = (output - 1 + padding) / stride;
  const int64_t reach = (filter - 1) * dilation / stride;
  Axis axis{source, output, 1, stride, last - first + 1, reach - first, {}, reach, first * stride - padding};
  for (int64_t t = 0; t < filter; ++t) axis.taps.push_back({0, t * dilation % stride, reach - t * dilation / stride});
  return axis;
}

Axis::Range Axis::inside(int64_t begin, int64_t end, int64_t phase) const {
  while (begin < end && output(begin, phase) < 0) ++begin;
  while (begin < end && output(end - 1, phase) >= output_size) --end;
  return {begin, end};
}

Window::Window(Axis rows_, Axis cols_, int64_t channels_, int64_t output_channels, int lanes, int64_t bytes)
    : rows(std::move(rows_)), cols(std::move(cols_)), channels(channels_) {
  // The tile shape that computes the fewest pixels outside the image; longer rows first.
  int64_t least = -1;
  for (int width : {16, 8, 4}) {
    const int64_t computed = round_up(cols.extent, width) * round_up(rows.extent, kTilePixels / width);
    if (least < 0 || computed < least) {
      least = computed;
      tile_cols = width;
    }
  }
  tile_rows = kTilePixels / tile_cols;
  window_cols = round_up(cols.extent, tile_cols) + cols.max_shift;
  row_pitch = cols.source_phases * window_cols;
  sums_row_pitch = window_cols - cols.max_shift;
  const int64_t vector_bytes = lanes * static_cast<int64_t>(sizeof(float));
  const int64_t halo_bytes = channels * rows.source_phases * rows.max_shift * row_pitch * vector_bytes;
  const int64_t row_bytes =
      (channels * rows.source_phases * row_pitch + output_channels * sums_row_pitch) * vector_bytes;
  const int64_t fitting = std::max<int64_t>((bytes - halo_bytes) / row_bytes, tile_rows) / tile_rows * tile_rows;
  // Equal strips: the last one must not be a sliver that converts as many halo rows as the others.
  strips = (rows.extent + fitting - 1) / fitting;
  strip = round_up((rows.extent + strips - 1) / strips, tile_rows);
  strips = (rows.extent + strip - 1) / strip;
  plane = rows.source_phases * (strip + rows.max_shift) * row_pitch;
  // Not a multiple of half the L1's period of 64 lines: otherwise the tiles of all channels fall into the same cache
  // sets and push the window out of them.
  sums_plane = strip * sums_row_pitch;
  if (sums_plane % 32 == 0) sums_plane += 16;
}

int64_t Window::tap_offset(int64_t tap, int64_t phase) const {
  const auto filter_cols = static_cast<int64_t>(cols.taps.size());
  const Axis::Tap& row = rows.taps[tap / filter_cols];
  const Axis::Tap& col = cols.taps[tap % filter_cols];
  if (row.output_phase != phase / cols.output_phases || col.output_phase != phase % cols.output_phases) return -1;
  return (row.source_phase * (strip + rows.max_shift) + row.shift) * row_pitch + col.source_phase * window_cols +
         col.shift;
}

// Measured from 0.5 to 8 MB on a core with 2 MB of L2: larger strips convert fewer halo rows and write longer runs, and
// win until the strip no longer leaves the L2 room for the lists (benchmarks/NOTES.md).
constexpr int64_t kStripBytes = 3 << 19;

Window forward_window(const Convolution& conv) {
  return {Axis::forward(conv.H, conv.P, conv.R, conv.stride[0], conv.padding[0], conv.dilation[0]),
          Axis::forward(conv.W, conv.Q, conv.S, conv.stride[1], conv.padding[1], conv.dilation[1]),
          conv.C,
          conv.K,
          SPARSE_ADV_CHOOSE(lane_count)(),
          kStripBytes};
}

Window grad_input_window(const Convolution& conv) {
  return {Axis::grad_input(conv.P, conv.H, conv.R, conv.stride[0], conv.padding[0], conv.dilation[0]),
          Axis::grad_input(conv.Q, conv.W, conv.S, conv.stride[1], conv.padding[1], conv.dilation[1]),
          conv.K,
          conv.C,
          SPARSE_ADV_CHOOSE(lane_count)(),
          kStripBytes};
}

Placement StripPlacement::describe(const Window& window, int64_t strip) {
  const Axis& rows = window.rows;
  const Axis& cols = window.cols;
  const int64_t window_rows = window.strip + rows.max_shift;
  const int64_t start = strip * window.strip * rows.source_phases - rows.pad;  // source row of window row 0
  const int64_t first = std::clamp<int64_t>(start, 0, rows.source_size);
  const int64_t last = std::clamp<int64_t>(start + window_rows * rows.source_phases, first, rows.source_size);
  place.assign((last - first) * cols.source_size, -1);
  std::vector<bool> filled(window.plane);
  bool skipped = false;
  for (int64_t y = first; y < last; ++y) {
    const int64_t row =
        ((y - start) % rows.source_phases * window_rows + (y - start) / rows.source_phases) * window.row_pitch;
    for (int64_t x = 0; x < cols.source_size; ++x) {
      const int64_t u = x + cols.pad;
      if (u < 0 || u / cols.source_phases >= window.window_cols) {
        skipped = true;
        continue;
      }
      const int64_t at = row + u % cols.source_phases * window.window_cols + u / cols.source_phases;
      place[(y - first) * cols.source_size + x] = static_cast<int32_t>(at);
      filled[at] = true;
    }
  }
  gaps.clear();
  for (int64_t i = 0; i < window.plane; ++i)
    if (!filled[i]) gaps.push_back(static_cast<int32_t>(i));
  return {first * cols.source_size,
          static_cast<int64_t>(place.size()),
          place.data(),
          gaps.data(),
          static_cast<int64_t>(gaps.size()),
          window.plane,
          !skipped && rows.source_phases == 1 && cols.source_phases == 1};
}

void describe_runs(const Window& window, int64_t strip, int64_t phase, std::vector<Run>& runs) {
  const Axis& rows = window.rows;
  const Axis& cols = window.cols;
  const int64_t row_phase = phase / cols.output_phases, col_phase = phase % cols.output_phases;
  const int64_t start = strip * window.strip;
  const auto [top, bottom] = rows.inside(start, std::min(start + window.strip, rows.extent), row_phase);
  const auto [left, right] = cols.inside(0, cols.extent, col_phase);
  runs.clear();
  if (left == right) return;
  for (int64_t m = top; m < bottom; ++m) {
    const Run run{static_cast<int32_t>((m - start) * window.sums_row_pitch + left),
                  static_cast<int32_t>(rows.output(m, row_phase) * cols.output_size + cols.output(left, col_phase)),
                  static_cast<int32_t>(right - left)};
    const bool follows = !runs.empty() && cols.output_phases == 1 && runs.back().from + runs.back().count == run.from &&
                         runs.back().to + runs.back().count == run.to;
    if (follows)
      runs.back().count += run.count;
    else
      runs.push_back(run);
  }
}

}  // namespace sparse_adv
