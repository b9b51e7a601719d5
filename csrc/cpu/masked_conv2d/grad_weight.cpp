#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/errors.h"
#include "common/layout.h"
#include "cpu/aligned_buffer.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/dense.h"
#include "cpu/masked_conv2d/grad_weight_kernel.h"
#include "cpu/masked_conv2d/input_tile.h"
#include "cpu/masked_conv2d/packing.h"
#include "cpu/masked_conv2d/plan.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

// The batch's strips are cut into parts with totals of their own, which are added in order at the end: the result does
// not depend on which thread computed which part. At most 16 parts, 64 bytes per kept weight; two strips each where
// there are enough of them, since clearing and adding totals costs 8 % of the time at one strip of 512@4 each.
int64_t count_parts(int64_t strips) { return std::min<int64_t>({strips, std::max<int64_t>(2, strips / 2), 16}); }

Tensor sparse_conv2d_grad_weight(const Convolution& conv, const Pattern& pattern, const Window& window,
                                 const Tensor& grad_output, const Tensor& input) {
  const auto compute = SPARSE_ADV_CHOOSE(masked_conv2d_grad_weight_tile);
  const Tensor images = in_plain_layout(input), grads = in_plain_layout(grad_output);
  Tensor grad_weight = torch::stable::new_empty(input, {conv.K, pattern.group_in_channels, conv.R, conv.S});

  const PatternLists lists = pattern.forward();
  std::unique_ptr<int32_t[]> offsets = window_offsets(lists, window);
  std::optional<ColumnOrder> order;
  if (window.sorts_by_column(lists.vector)) {
    order.emplace(lists, window);
    auto sorted = std::make_unique_for_overwrite<int32_t[]>(lists.entry_count);
    for (int64_t i = 0; i < lists.entry_count; ++i) sorted[order->place[i]] = offsets[i];
    offsets = std::move(sorted);
  }
  const OffsetLists offset_lists{lists.vector,
                                 lists.vectors,
                                 lists.segments,
                                 lists.rows,
                                 offsets.get(),
                                 nullptr,
                                 order ? Columns::by_column : Columns::any,
                                 order ? order->turns.data() : nullptr};
  const std::vector<int32_t> channel_of = channels_of_rows(lists, pattern.groups, pattern.group_out_channels());

  const int64_t lanes = window.lanes, grad_plane = GradFiller(window).plane;
  const int64_t window_size = window.block_size(), grad_size = conv.K * grad_plane * lanes;
  const int64_t items = window.items(), parts = count_parts(items);
  const int64_t total_count = lists.vector * lists.entry_count;
  const auto totals = std::make_unique_for_overwrite<float[]>(parts * total_count);

  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedBuffer buffer;
    float* const scratch = buffer.at_least(window_size + grad_size);
    float* const grad_scratch = scratch + window_size;
    StripPlacement placement;
    GradFiller grad_filler(window);
    if (window.lane_is_pixel) std::fill_n(scratch, window_size, 0.0f);
    for (int64_t part = begin; part < end; ++part) {
      float* const part_totals = totals.get() + part * total_count;
      std::fill_n(part_totals, total_count, 0.0f);
      for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item) {
        const int64_t strip = item % window.strips, strip_rows = window.rows_of(strip);
        const Filler filler(window, placement, strip, images_of(images, window, item));
        grad_filler.fill(images_of(grads, window, item), strip, grad_scratch);
        for (int64_t first = 0; first < conv.C; first += window.block) {
          filler.fill(first, scratch);
          const auto [first_segment, last_segment] = segments_of_block(lists, window, first);
          for (int64_t row = 0; row < strip_rows; row += window.tile_rows)
            for (int64_t col = 0; col < window.across; col += window.tile_cols)
              compute(offset_lists, first_segment, last_segment,
                      {scratch + (row * window.row_pitch + col) * lanes,
                       grad_scratch + (row * window.across + col) * lanes, window.row_pitch * lanes,
                       window.across * lanes, grad_plane * lanes, window.tile_cols, channel_of.data()},
                      part_totals);
        }
      }
    }
  });

  const bool finite =
      unpack_totals(lists, pattern.groups, pattern.group_out_channels(), WeightLayout::forward(grad_weight, pattern),
                    totals.get(), parts, order ? order->place.get() : nullptr, grad_weight.mutable_data_ptr<float>());
  // Tiles reach beyond the image, where 0 times a pixel that is not finite is not 0: the dense pass knows where it
  // ends.
  return finite ? grad_weight : dense_conv2d_grad_weight(conv, pattern, grad_output, input);
}

Tensor masked_conv2d_grad_weight_cpu(Tensor grad_output, Tensor input, std::vector<Tensor> pattern_tensors,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const Convolution conv =
      make_convolution(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding, dilation, groups);
  check(grad_output.scalar_type() == input.scalar_type(), "grad_output must have the input's dtype");
  check_size("grad_output", grad_output, {conv.N, conv.K, conv.P, conv.Q});
  const Plan plan = make_plan(pattern, conv, Pass::grad_weight, input.scalar_type(),
                              is_channels_last(input) || is_channels_last(grad_output));
  if (plan.kernel == Kernel::sparse) return sparse_conv2d_grad_weight(conv, pattern, *plan.window, grad_output, input);
  return dense_conv2d_grad_weight(conv, pattern, grad_output, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d_grad_weight", SPARSE_ADV_BOX(&masked_conv2d_grad_weight_cpu));
}

}  // namespace sparse_adv
