#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "common/errors.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/tensor_checks.h"
#include "cpu/aligned_buffer.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/dense.h"
#include "cpu/masked_conv2d/grad_weight_kernel.h"
#include "cpu/masked_conv2d/input_tile.h"
#include "cpu/masked_conv2d/oc_splits.h"
#include "cpu/masked_conv2d/packing.h"
#include "cpu/masked_conv2d/plan.h"
#include "cpu/work_stealing.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

// The work items of a batch are divided among arrays of partial sums, which are added in order at the end: the result
// does not depend on which thread computed which of them. There are 16 at most, 64 bytes per kept weight; and where
// possible two work items for each, since with one, clearing and adding the partial sums took 8 % of the time of 512
// channels at 4x4.
int64_t count_partials(int64_t work_items) {
  return std::min<int64_t>({work_items, std::max<int64_t>(2, work_items / 2), 16});
}

// Adds the products of work items to partial sums, in the scratch memory of a thread.
class PartialComputer {
 public:
  PartialComputer(const PackedWeights& weights, const BlockCsr& csr, const Blocking& blocking,
                  const OutputChannels& channels, const Tensor& input, const Tensor& grad_output)
      : weights_(weights),
        csr_(csr),
        blocking_(blocking),
        channels_(channels),
        input_(input),
        grad_output_(grad_output),
        input_loader_(blocking),
        grad_loader_(blocking, grad_output.size(1)),
        input_tile_(scratch_.at_least(blocking.input_tile_size() + grad_loader_.size)),
        grad_tile_(input_tile_ + blocking.input_tile_size()) {
    if (blocking.has_gaps()) std::fill_n(input_tile_, blocking.input_tile_size(), 0.0f);
    if (blocking.joins_rows()) std::fill_n(grad_tile_, grad_loader_.size, 0.0f);
  }

  // Sets the sums of these oc_blocks to 0.
  void clear(Range oc_blocks, float* partial) const {
    for (int64_t ic_block = 0; ic_block < csr_.ic_blocks; ++ic_block) {
      const int32_t* const row_offsets = csr_.row_offsets + ic_block * csr_.oc_blocks;
      std::fill(partial + row_offsets[oc_blocks.begin] * csr_.oc_block,
                partial + row_offsets[oc_blocks.end] * csr_.oc_block, 0.0f);
    }
  }

  void add(int64_t work_item, Range oc_blocks, float* partial) {
    const int64_t band = work_item % blocking_.bands, rows = blocking_.computed_rows(band), lanes = blocking_.lanes;
    input_loader_.start_band(band, images_of(input_, blocking_, work_item));
    grad_loader_.fill(images_of(grad_output_, blocking_, work_item), band, channels_of(csr_, oc_blocks), grad_tile_);
    for (int64_t channel = 0; channel < blocking_.source_channels; channel += blocking_.ic_slice) {
      input_loader_.fill(channel, input_tile_);
      const Range ic_blocks = ic_blocks_of_slice(csr_, blocking_, channel);
      for (int64_t row = 0; row < rows; row += blocking_.tile_rows)
        for (int64_t col = 0; col < blocking_.row_vectors; col += blocking_.tile_cols)
          SPARSE_ADV_CHOOSE(masked_conv2d_grad_weight_tile)(
              weights_, ic_blocks,
              {.input = input_tile_ + (row * blocking_.row_pitch + col) * lanes,
               .grad = grad_tile_ + (row * grad_loader_.row_pitch + col) * lanes,
               .input_row_pitch = blocking_.row_pitch * lanes,
               .grad_row_pitch = grad_loader_.row_pitch * lanes,
               .grad_channel_pitch = grad_loader_.channel_pitch * lanes,
               .cols = blocking_.tile_cols,
               .oc_blocks = oc_blocks,
               .channel_of = channels_.channel_of.data()},
              partial);
    }
  }

 private:
  const PackedWeights& weights_;
  const BlockCsr& csr_;
  const Blocking& blocking_;
  const OutputChannels& channels_;
  const Tensor& input_;
  const Tensor& grad_output_;
  InputTileLoader input_loader_;
  GradTileLoader grad_loader_;
  ScratchUse scratch_;
  float* const input_tile_;
  float* const grad_tile_;
};

Tensor sparse_conv2d_grad_weight(const ConvParams& conv, const Pattern& pattern, const Blocking& blocking,
                                 const Tensor& grad_output, const Tensor& input) {
  const Tensor plain_input = in_plain_layout(input), plain_grad = in_plain_layout(grad_output);
  Tensor grad_weight = torch::stable::new_empty(input, {conv.K, pattern.group_in_channels, conv.R, conv.S});

  const BlockCsr csr = pattern.forward_csr();
  std::unique_ptr<int32_t[]> offsets = input_offsets(csr, blocking);
  std::optional<ColumnOrder> columns;
  if (blocking.can_sort_by_column(csr.oc_block)) {
    columns.emplace(csr, blocking);
    offsets = reordered(offsets.get(), columns->order.get(), csr.nnz, 1);
  }
  const PackedWeights weights{.oc_block = csr.oc_block,
                              .oc_blocks = csr.oc_blocks,
                              .ic_blocks = csr.ic_blocks,
                              .row_offsets = csr.row_offsets,
                              .input_offsets = offsets.get(),
                              .values = nullptr,
                              .order = columns ? IndexOrder::by_column : IndexOrder::any,
                              .column_splits = columns ? columns->column_splits.data() : nullptr};
  const OutputChannels channels(csr);

  const int64_t work_items = blocking.work_items(), count = count_partials(work_items);
  const int64_t partial_size = csr.oc_block * csr.nnz;
  const auto partials = std::make_unique_for_overwrite<float[]>(count * partial_size);
  // With fewer arrays than threads, several threads share an array by output channels. The number of splits is rounded
  // down: rounded up, some thread would take two of them while others wait, which takes no less time.
  const int64_t all_threads = torch::stable::get_num_threads();
  const int64_t splits = count_oc_splits(csr, std::max<int64_t>(all_threads / count, 1));
  const int64_t threads = std::min(all_threads, count * splits);
  SharedItems shared(count * splits, threads);
  parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    PartialComputer computer(weights, csr, blocking, channels, plain_input, plain_grad);
    shared.take(thread, [&](int64_t i) {
      const int64_t number = i / splits;
      const Range oc_blocks = oc_blocks_of_split(csr, splits, i % splits);
      float* const partial = partials.get() + number * partial_size;
      computer.clear(oc_blocks, partial);
      for (int64_t item = number * work_items / count; item < (number + 1) * work_items / count; ++item)
        computer.add(item, oc_blocks, partial);
    });
  });

  const bool finite =
      scatter_weight_gradient(csr, WeightLayout::forward(grad_weight, pattern), partials.get(), count,
                              columns ? columns->order.get() : nullptr, grad_weight.mutable_data_ptr<float>());
  // Tiles extend beyond the image, where grad_output counts as 0, and 0 times an infinite or NaN pixel is NaN. The
  // dense kernel stops at the end of the image.
  return finite ? grad_weight : dense_conv2d_grad_weight(conv, pattern, grad_output, input);
}

Tensor masked_conv2d_grad_weight_cpu(Tensor grad_output, Tensor input, std::vector<Tensor> pattern_tensors,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const ConvParams conv =
      make_conv_params(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding, dilation, groups);
  check(grad_output.scalar_type() == input.scalar_type(), "grad_output must have the input's dtype");
  check_size("grad_output", grad_output, {conv.N, conv.K, conv.P, conv.Q});
  const Plan plan = make_plan(pattern, conv, Pass::grad_weight, input.scalar_type(),
                              is_channels_last(input) || is_channels_last(grad_output));
  if (plan.kernel == Kernel::sparse)
    return sparse_conv2d_grad_weight(conv, pattern, *plan.blocking, grad_output, input);
  return dense_conv2d_grad_weight(conv, pattern, grad_output, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d_grad_weight", SPARSE_ADV_BOX(&masked_conv2d_grad_weight_cpu));
}

}  // namespace sparse_adv
