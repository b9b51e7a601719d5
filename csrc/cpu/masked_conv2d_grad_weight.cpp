#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/aligned_buffer.h"
#include "cpu/convolution.h"
#include "cpu/dense_conv2d.h"
#include "cpu/masked_conv2d_grad_weight_kernel.h"
#include "cpu/path.h"
#include "cpu/sparse_pass.h"
#include "layout.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

// The output channel of each row of each vector; -1 beyond the end of a group.
std::vector<int32_t> channels_of_rows(const PatternLists& lists, const Pattern& pattern) {
  const int64_t group_rows = pattern.group_out_channels();
  std::vector<int32_t> channels;
  for (int64_t i = 0; i < lists.vectors * lists.vector; ++i) {
    const int64_t padded = lists.vectors / pattern.groups * lists.vector;
    const int64_t row = i % padded;
    channels.push_back(row < group_rows ? static_cast<int32_t>(i / padded * group_rows + row) : -1);
  }
  return channels;
}

// Strips of grad_output: lane = sample, as many rows as the input's window, no padding.
Placement grad_strip(const Window& window, int64_t strip, int64_t row_pitch, StripPlacement& buffers) {
  const Axis& rows = window.rows;
  const int64_t cols = window.cols.extent, first = strip * window.strip;
  const int64_t count = std::min(window.strip, rows.extent - first);
  buffers.place.clear();
  buffers.gaps.clear();
  for (int64_t at = 0; at < window.strip * row_pitch; ++at) {
    const bool inside = at / row_pitch < count && at % row_pitch < cols;
    (inside ? buffers.place : buffers.gaps).push_back(static_cast<int32_t>(at));
  }
  return {first * cols,
          count * cols,
          buffers.place.data(),
          buffers.gaps.data(),
          static_cast<int64_t>(buffers.gaps.size()),
          window.strip * row_pitch,
          true};
}

// The batch's strips are cut into parts with totals of their own, which are added in order at the end: the result does
// not depend on which thread computed which part. At most 16 parts, 64 bytes per kept weight; two strips each where
// there are enough of them, since clearing and adding totals costs 8 % of the time at one strip of 512@4 each.
int64_t count_parts(int64_t strips) { return std::min<int64_t>({strips, std::max<int64_t>(2, strips / 2), 16}); }

Tensor sparse_conv2d_grad_weight(const Convolution& conv, const Pattern& pattern, const Tensor& grad_output,
                                 const Tensor& input) {
  const int lanes = SPARSE_ADV_CHOOSE(lane_count)();
  const auto fill = SPARSE_ADV_CHOOSE(fill_window);
  const auto compute = SPARSE_ADV_CHOOSE(masked_conv2d_grad_weight_tile);
  const Tensor images = in_plain_layout(input), grads = in_plain_layout(grad_output);
  Tensor grad_weight = torch::stable::new_empty(input, {conv.K, pattern.group_in_channels, conv.R, conv.S});

  const PatternLists lists = pattern.forward();
  const Window window = forward_window(conv);
  const std::unique_ptr<int32_t[]> offsets = window_offsets(lists, window, lanes);
  const OffsetLists offset_lists{lists.vector, lists.vectors, lists.segments, lists.rows, offsets.get(), nullptr};
  const std::vector<int32_t> channel_of = channels_of_rows(lists, pattern);

  const int64_t grad_row_pitch = window.sums_row_pitch;
  const int64_t grad_plane = window.strip * grad_row_pitch;
  const int64_t window_size = conv.C * window.plane * lanes, grad_size = conv.K * grad_plane * lanes;
  const int64_t items = (conv.N + lanes - 1) / lanes * window.strips, parts = count_parts(items);
  const int64_t total_count = lists.vector * lists.entry_count;
  const auto totals = std::make_unique_for_overwrite<float[]>(parts * total_count);

  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedBuffer buffer;
    float* const scratch = buffer.at_least(window_size + grad_size);
    float* const grad_scratch = scratch + window_size;
    StripPlacement placement, grad_placement;
    for (int64_t part = begin; part < end; ++part) {
      float* const part_totals = totals.get() + part * total_count;
      std::fill_n(part_totals, total_count, 0.0f);
      for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item) {
        const int64_t first = item / window.strips * lanes, strip = item % window.strips;
        fill(images_of(images, first, lanes), placement.describe(window, strip), 0, conv.C, scratch);
        fill(images_of(grads, first, lanes), grad_strip(window, strip, grad_row_pitch, grad_placement), 0, conv.K,
             grad_scratch);
        const int64_t end_row = std::min(window.strip, window.rows.extent - strip * window.strip);
        for (int64_t m = 0; m < end_row; m += window.tile_rows)
          for (int64_t l = 0; l < window.cols.extent; l += window.tile_cols)
            compute(offset_lists,
                    {scratch + (m * window.row_pitch + l) * lanes, grad_scratch + (m * grad_row_pitch + l) * lanes,
                     window.row_pitch * lanes, grad_row_pitch * lanes, grad_plane * lanes, window.tile_cols,
                     channel_of.data()},
                    part_totals);
      }
    }
  });

  unpack_totals(lists, pattern.groups, pattern.group_out_channels(), WeightLayout::forward(grad_weight, pattern),
                totals.get(), parts, grad_weight.mutable_data_ptr<float>());
  return grad_weight;
}

Tensor masked_conv2d_grad_weight_cpu(Tensor grad_output, Tensor input, std::vector<Tensor> pattern_tensors,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const Convolution conv =
      make_convolution(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding, dilation, groups);
  check(grad_output.scalar_type() == input.scalar_type(), "grad_output must have the input's dtype");
  check_size("grad_output", grad_output, {conv.N, conv.K, conv.P, conv.Q});
  if (choose_path(pattern, conv, Pass::grad_weight, input.scalar_type()) == Path::sparse)
    return sparse_conv2d_grad_weight(conv, pattern, grad_output, input);
  return dense_conv2d_grad_weight(conv, pattern, grad_output, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d_grad_weight", TORCH_BOX(&masked_conv2d_grad_weight_cpu));
}

}  // namespace sparse_adv
