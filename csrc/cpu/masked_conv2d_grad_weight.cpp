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

// Cuts the vectors into `parts` ranges of about equally many entries: [0, ..., vectors].
std::vector<int64_t> balanced_ranges(const PatternLists& lists, int64_t parts) {
  std::vector<int64_t> work(lists.vectors);
  for (int64_t list = 0; list < lists.vectors * lists.segments; ++list)
    work[list % lists.vectors] += lists.rows[list + 1] - lists.rows[list];
  std::vector<int64_t> bounds{0};
  int64_t done = 0;
  for (int64_t i = 0; i < lists.vectors; ++i) {
    done += work[i];
    while (static_cast<int64_t>(bounds.size()) < parts &&
           done * parts >= lists.entry_count * static_cast<int64_t>(bounds.size()))
      bounds.push_back(i + 1);
  }
  bounds.resize(parts, lists.vectors);
  bounds.push_back(lists.vectors);
  return bounds;
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

// Threads own ranges of output channels, not of images: no sum crosses threads, so the result does not depend on their
// number and needs one float per kept weight in all.
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
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<int64_t> bounds = balanced_ranges(lists, threads);

  const int64_t grad_row_pitch = window.sums_row_pitch;
  const int64_t grad_plane = window.strip * grad_row_pitch;
  const int64_t window_size = conv.C * window.plane * lanes, grad_size = conv.K * grad_plane * lanes;
  std::vector<float> totals(lists.vector * lists.entry_count);
  thread_local AlignedBuffer buffer;
  float* const scratch = buffer.at_least(window_size + grad_size);
  float* const grad_scratch = scratch + window_size;

  const int64_t batches = (conv.N + lanes - 1) / lanes;
  StripPlacement placement, grad_placement;
  for (int64_t item = 0; item < batches * window.strips; ++item) {
    const int64_t first = item / window.strips * lanes, strip = item % window.strips;
    const Placement place = placement.describe(window, strip);
    const Placement grad_place = grad_strip(window, strip, grad_row_pitch, grad_placement);
    const Images image = images_of(images, first, lanes), grad = images_of(grads, first, lanes);
    const auto pieces = [&](int64_t channels) { return (channels + lanes - 1) / lanes; };
    torch::stable::parallel_for(0, pieces(conv.C) + pieces(conv.K), 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const bool of_image = piece < pieces(conv.C);
        const int64_t channel = (of_image ? piece : piece - pieces(conv.C)) * lanes;
        const int64_t last = std::min(channel + lanes, of_image ? conv.C : conv.K);
        fill(of_image ? image : grad, of_image ? place : grad_place, channel, last, of_image ? scratch : grad_scratch);
      }
    });
    const int64_t end_row = std::min(window.strip, window.rows.extent - strip * window.strip);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        for (int64_t m = 0; m < end_row; m += window.tile_rows)
          for (int64_t l = 0; l < window.cols.extent; l += window.tile_cols)
            compute(offset_lists,
                    {scratch + (m * window.row_pitch + l) * lanes, grad_scratch + (m * grad_row_pitch + l) * lanes,
                     window.row_pitch * lanes, grad_row_pitch * lanes, grad_plane * lanes, window.tile_cols,
                     channel_of.data()},
                    bounds[part], bounds[part + 1], totals.data());
    });
  }

  const WeightLayout layout = WeightLayout::forward(grad_weight, pattern);
  unpack_totals(lists, pattern.groups, pattern.group_out_channels(), layout, totals.data(),
                grad_weight.mutable_data_ptr<float>());
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
