#include "cpu/masked_conv2d/sparse.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/layout.h"
#include "common/parallel.h"
#include "common/range.h"
#include "cpu/aligned_buffer.h"
#include "cpu/masked_conv2d/conv_kernel.h"
#include "cpu/masked_conv2d/gate_rows.h"
#include "cpu/masked_conv2d/input_tile.h"
#include "cpu/masked_conv2d/oc_splits.h"
#include "cpu/work_stealing.h"

namespace sparse_adv {

using torch::stable::Tensor;

namespace {

// The weights of a pass as the kernel reads them, those of each output phase. `phases` points into the other members.
struct PassWeights {
  std::vector<int32_t> row_offsets, column_splits, filter_row_starts;
  std::unique_ptr<int32_t[]> input_offsets;
  std::unique_ptr<float[]> values;
  std::vector<PackedWeights> phases;
};

std::unique_ptr<float[]> pack_values(const SparseConv& conv) {
  auto values = std::make_unique_for_overwrite<float[]>(conv.csr.nnz * conv.csr.oc_block);
  pack_values(conv.csr, conv.weight, nullptr, values.get());
  return values;
}

PassWeights pack_weights(const SparseConv& conv) {
  const BlockCsr& csr = conv.csr;
  const Blocking& blocking = conv.blocking;
  PassWeights weights{.row_offsets = {},
                      .column_splits = {},
                      .filter_row_starts = {},
                      .input_offsets = input_offsets(csr, blocking),
                      .values = csr.values ? nullptr : pack_values(conv),
                      .phases = {}};
  const float* values = csr.values ? csr.values : weights.values.get();
  const int32_t* row_offsets = csr.row_offsets;
  const auto reorder = [&](const int32_t* order) {
    weights.input_offsets = reordered(weights.input_offsets.get(), order, csr.nnz, 1);
    weights.values = reordered(values, order, csr.nnz, csr.oc_block);
  };
  IndexOrder index_order = csr.filter_row_triples ? blocking.triple_order() : IndexOrder::any;
  if (blocking.output_phases() > 1) {
    PhaseOrder order(csr, blocking);
    reorder(order.order.get());
    weights.row_offsets = std::move(order.row_offsets);
    row_offsets = weights.row_offsets.data();
  } else if (!csr.filter_row_triples && blocking.can_sort_by_column(csr.oc_block)) {
    ColumnOrder order(csr, blocking);
    reorder(order.order.get());
    weights.column_splits = std::move(order.column_splits);
    index_order = IndexOrder::by_column;
  } else if (index_order == IndexOrder::any &&
             blocking.should_skip_padding(csr.oc_block, csr.nnz / std::max<int64_t>(csr.rows(), 1))) {
    weights.filter_row_starts = filter_row_starts(csr, blocking);
  }
  for (int64_t phase = 0; phase < blocking.output_phases(); ++phase)
    weights.phases.push_back(
        {.oc_block = csr.oc_block,
         .oc_blocks = csr.oc_blocks,
         .ic_blocks = csr.ic_blocks,
         .row_offsets = row_offsets + phase * csr.rows(),
         .input_offsets = weights.input_offsets.get(),
         .values = weights.values ? weights.values.get() : csr.values,
         .order = index_order,
         .column_splits = weights.column_splits.empty() ? nullptr : weights.column_splits.data(),
         .filter_row_starts = weights.filter_row_starts.empty() ? nullptr : weights.filter_row_starts.data(),
         .filter_rows = std::ssize(blocking.rows.taps)});
  return weights;
}

// The epilogue of a part of the output, which begins at this element and at this byte of the gates.
Epilogue<float> starting_at(Epilogue<float> epilogue, int64_t element, int64_t gate_byte) {
  if (epilogue.residual) epilogue.residual += element;
  if (epilogue.gate_out) epilogue.gate_out += gate_byte;
  if (epilogue.gate) epilogue.gate += gate_byte;
  return epilogue;
}

// Computes bands in the scratch memory of a thread, which holds the input tile followed by the accumulators.
class BandComputer {
 public:
  BandComputer(const SparseConv& conv, const std::vector<PackedWeights>& phases, const OutputChannels& channels,
               Tensor& output)
      : conv_(conv),
        blocking_(conv.blocking),
        phases_(phases),
        channels_(channels),
        output_(output),
        planes_(conv.csr.oc_blocks * conv.csr.oc_block),
        input_tile_(scratch_.at_least(blocking_.input_tile_size() + blocking_.acc_size(planes_) * blocking_.lanes)),
        accumulators_(input_tile_ + blocking_.input_tile_size()),
        loader_(blocking_) {
    if (blocking_.has_gaps()) std::fill_n(input_tile_, blocking_.input_tile_size(), 0.0f);
  }

  void run(int64_t work_item, Range oc_blocks) {
    oc_blocks_ = oc_blocks;
    const int64_t band = work_item % blocking_.bands;
    const Images output = images_of(output_, blocking_, work_item);
    const int64_t at = output.data - output_.const_data_ptr<float>();
    float* const data = output_.mutable_data_ptr<float>() + at;
    const Epilogue<float> epilogue =
        starting_at(conv_.epilogue, at, at / output.image_size * conv_.epilogue.gate_layout.image_bytes);
    loader_.start_band(band, images_of(conv_.source, blocking_, work_item));
    filter_rows_.clear();
    for (int64_t row = 0; phases_[0].filter_row_starts && row < blocking_.rows_in_band(band); ++row)
      filter_rows_.push_back(blocking_.filter_rows_inside(band * blocking_.band_rows + row));
    for (int64_t channel = 0; channel < blocking_.source_channels; channel += blocking_.ic_slice) {
      loader_.fill(channel, input_tile_);
      if (blocking_.width_vectorised() && !blocking_.joins_rows())
        add_slice_and_write(band, channel, epilogue, output, data);
      else
        add_slice(band, channel);
    }
    if (blocking_.joins_rows())
      SPARSE_ADV_CHOOSE(store_joined_rows)(joined_rows_of_band(band), epilogue, output.channels, output.pixels, data);
    else if (!blocking_.width_vectorised())
      SPARSE_ADV_CHOOSE(store_accumulators)(accumulators_of_band(band), epilogue, output, data);
  }

 private:
  template <class Visit>
  void for_each_tile(int64_t band, const Visit& visit) const {
    const int64_t lanes = blocking_.lanes, rows = blocking_.computed_rows(band);
    for (int64_t row = 0; row < rows; row += blocking_.tile_rows) {
      const int64_t vectors = blocking_.vectors_in_row(band, row);
      for (int64_t col = 0; col < vectors; col += blocking_.tile_cols)
        visit(row, col,
              ConvTile{.cols = blocking_.tile_cols,
                       .rows_inside = std::min<int64_t>(rows - row, blocking_.tile_rows),
                       .cols_inside = std::min<int64_t>(vectors - col, blocking_.tile_cols),
                       .input = input_tile_ + (row * blocking_.row_pitch + col) * lanes,
                       .input_row_pitch = blocking_.row_pitch * lanes,
                       .accumulators = accumulators_ + blocking_.acc_offset(row, col, planes_) * lanes,
                       .acc_row_pitch = blocking_.acc_row_pitch * lanes,
                       .acc_channel_pitch = blocking_.acc_channel_pitch * lanes,
                       .output = nullptr,
                       .oc_blocks = oc_blocks_,
                       .filter_rows = filter_rows_.empty() ? nullptr : filter_rows_.data() + row});
    }
  }

  // The accumulators, of all output phases, stay in the scratch memory until the band is stored.
  void add_slice(int64_t band, int64_t first_channel) const {
    const Range ic_blocks = ic_blocks_of_slice(conv_.csr, blocking_, first_channel);
    for (int64_t phase = 0; phase < blocking_.output_phases(); ++phase)
      for_each_tile(band, [&](int64_t, int64_t, ConvTile tile) {
        tile.accumulators += phase * blocking_.acc_phase_pitch * blocking_.lanes;
        SPARSE_ADV_CHOOSE(masked_conv2d_tile)(phases_[phase], ic_blocks, tile);
      });
  }

  // Rows that are not joined, and segments: the last slice writes to the output.
  void add_slice_and_write(int64_t band, int64_t first_channel, const Epilogue<float>& epilogue, const Images& output,
                           float* data) {
    const Range ic_blocks = ic_blocks_of_slice(conv_.csr, blocking_, first_channel);
    const int64_t width = blocking_.cols.output_size;
    const GateLayout& gates = epilogue.gate_layout;
    const bool is_gated = epilogue.gate_out || epilogue.gate, is_padded = gates.row_size % 8 != 0;
    for_each_tile(band, [&](int64_t row, int64_t col, ConvTile tile) {
      const int64_t first_row = band * blocking_.band_rows + row, first_col = col * blocking_.lanes;
      const int64_t at = first_row * width + first_col;
      OutputRegion region{.data = data + at,
                          .row_pitch = width,
                          .channel_pitch = output.pixels,
                          .rows = blocking_.rows_in_band(band) - row,
                          .cols = blocking_.cols_in_row(first_row, width) - first_col,
                          .first_col = first_col,
                          .gate_channel_pitch = gates.image_bytes / output.channels,
                          .channel_of = channels_.channel_of.data(),
                          .epilogue = starting_at(
                              epilogue, at, is_padded ? at / gates.row_size * gates.row_bytes : (at - first_col) / 8)};
      tile.output = &region;
      const auto compute = [&] { SPARSE_ADV_CHOOSE(masked_conv2d_tile)(phases_[0], ic_blocks, tile); };
      if (blocking_.in_segments() && is_gated && is_padded && ic_blocks.end == conv_.csr.ic_blocks)
        with_gates_of_segment(region, compute);
      else
        compute();
    });
  }

  // A segment has whole rows, one behind the other, but each row of a gate is padded to bytes. So compute() reads and
  // writes gates of the segment without padding, which are made from the padded ones before and written to them after.
  template <class Compute>
  void with_gates_of_segment(OutputRegion& region, const Compute& compute) {
    const Epilogue<float> padded = region.epilogue;
    const int64_t padded_pitch = region.gate_channel_pitch;
    const int64_t row_size = padded.gate_layout.row_size, rows = region.cols / row_size;
    const Range channels = channels_to_write();
    const int64_t pitch = blocking_.lanes * kTileVectors / 8;
    segment_gates_.resize(channels.end * pitch);
    region.gate_channel_pitch = pitch;
    region.epilogue.gate = padded.gate ? segment_gates_.data() : nullptr;
    region.epilogue.gate_out = padded.gate_out ? segment_gates_.data() : nullptr;
    for (int64_t k = channels.begin; padded.gate && k < channels.end; ++k)
      remove_padding(padded.gate + k * padded_pitch, row_size, rows, segment_gates_.data() + k * pitch);
    compute();
    for (int64_t k = channels.begin; padded.gate_out && k < channels.end; ++k)
      add_padding(segment_gates_.data() + k * pitch, row_size, rows, padded.gate_out + k * padded_pitch);
  }

  Range channels_to_write() const { return channels_of(conv_.csr, oc_blocks_); }

  // The rows of the images that a band computes.
  Range image_rows_of_band(int64_t band) const {
    const ConvAxis& rows = blocking_.rows;
    const int64_t height = blocking_.band_rows * rows.output_phases;
    return {.begin = band * height, .end = std::min((band + 1) * height, rows.output_size)};
  }

  JoinedRows joined_rows_of_band(int64_t band) const {
    const Range rows = image_rows_of_band(band);
    return {.data = accumulators_,
            .plane_of = channels_.plane_of.data(),
            .channel_pitch = blocking_.acc_channel_pitch * blocking_.lanes,
            .phase_pitch = blocking_.acc_phase_pitch * blocking_.lanes,
            .row_pitch = blocking_.joined_pitch,
            .row_phases = blocking_.rows.output_phases,
            .col_phases = blocking_.cols.output_phases,
            .first_row = rows.begin,
            .row_count = rows.end - rows.begin,
            .row_size = blocking_.cols.output_size,
            .channels = channels_to_write()};
  }

  // Batch-vectorised: the pixels of the output that a band computes, and the position of each in a plane.
  Accumulators accumulators_of_band(int64_t band) {
    const ConvAxis& rows = blocking_.rows;
    const ConvAxis& cols = blocking_.cols;
    const auto [top, bottom] = image_rows_of_band(band);
    positions_.clear();
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t x = 0; x < cols.output_size; ++x) {
        const int64_t phase = y % rows.output_phases * cols.output_phases + x % cols.output_phases;
        const int64_t row = (y - top) / rows.output_phases, col = x / cols.output_phases;
        positions_.push_back(
            static_cast<int32_t>(phase * blocking_.acc_phase_pitch + row * blocking_.acc_row_pitch + col));
      }
    return {.data = accumulators_,
            .plane_of = channels_.plane_of.data(),
            .channel_pitch = blocking_.acc_channel_pitch,
            .first_pixel = top * cols.output_size,
            .pixel_count = std::ssize(positions_),
            .positions = positions_.data(),
            .channels = channels_to_write()};
  }

  const SparseConv& conv_;
  const Blocking& blocking_;
  const std::vector<PackedWeights>& phases_;
  const OutputChannels& channels_;
  Tensor& output_;
  const int64_t planes_;
  ScratchUse scratch_;
  float* const input_tile_;
  float* const accumulators_;
  InputTileLoader loader_;
  Range oc_blocks_{};
  std::vector<FilterRows> filter_rows_;
  std::vector<int32_t> positions_;
  std::vector<uint8_t> segment_gates_;
};

}  // namespace

void run_sparse_conv(const SparseConv& conv, Tensor& output) {
  const PassWeights weights = pack_weights(conv);
  const OutputChannels channels(conv.csr);
  const int64_t threads = torch::stable::get_num_threads(), items = conv.blocking.work_items();
  const int64_t oc_splits = count_oc_splits(conv.csr, threads), whole = items / threads * threads;
  SharedItems whole_items(whole, threads), splits((items - whole) * oc_splits, threads);
  parallel_for(0, std::min(threads, items * oc_splits), 1, [&](int64_t thread, int64_t) {
    BandComputer computer(conv, weights.phases, channels, output);
    whole_items.take(thread, [&](int64_t item) { computer.run(item, {.begin = 0, .end = conv.csr.oc_blocks}); });
    splits.take(thread, [&](int64_t split) {
      computer.run(whole + split / oc_splits, oc_blocks_of_split(conv.csr, oc_splits, split % oc_splits));
    });
  });
}

}  // namespace sparse_adv
