// The ops `masked_winograd_conv2d_weight` and `masked_winograd_conv2d_out`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/errors.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "common/tensor_checks.h"
#include "cpu/aligned_buffer.h"
#include "cpu/epilogue_tensors.h"
#include "cpu/l2_cache.h"
#include "cpu/masked_winograd_conv2d/conv_kernel.h"
#include "cpu/masked_winograd_conv2d/items.h"
#include "cpu/masked_winograd_conv2d/weight_kernel.h"
#include "cpu/winograd_conv2d/operands.h"
#include "cpu/work_stealing.h"

namespace sparse_adv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Of an item, if a row of tiles has not more: 16, 32 and 64 take 6.2, 5.8 and 5.2 ms at 64@32, blocks (4, 4, 3, 3).
constexpr int64_t kMostTiles = 64;
constexpr int64_t kFiltersOfTask = 512;   // that a thread transforms, at least: chosen, not tuned
constexpr int64_t kLeastOutChannels = 8;  // of a slice: chosen, not tuned

void check_indices(const char* name, const Tensor& list) {
  check_size(name, list, {list.numel()});
  check(list.is_contiguous(), name, " must be contiguous, got strides ", text_of(list.strides()));
  check(list.scalar_type() == ScalarType::Int, name, " must be int32, got ", list.scalar_type());
}

// Throws unless the lists are those of a matrix of this size.
LiveFilters check_live_filters(const Tensor& row_offsets, const Tensor& channels, int64_t oc_block, int64_t K,
                               int64_t C) {
  check(oc_block == 1 || oc_block == 2 || oc_block == 4, "oc_block must be 1, 2 or 4, got ", oc_block);
  check_indices("row_offsets", row_offsets);
  check_indices("channels", channels);
  check_size("row_offsets", row_offsets, {divide_up(K, oc_block) + 1});
  const LiveFilters filters{.oc_block = oc_block,
                            .oc_blocks = divide_up(K, oc_block),
                            .row_offsets = row_offsets.const_data_ptr<int32_t>(),
                            .channels = channels.const_data_ptr<int32_t>(),
                            .count = channels.size(0)};
  const int32_t* const offsets = filters.row_offsets;
  check(offsets[0] == 0 && offsets[filters.oc_blocks] == filters.count &&
            std::is_sorted(offsets, offsets + filters.oc_blocks + 1),
        "row_offsets must ascend from 0 to the number of channels, ", filters.count);
  const auto inside = [&](int32_t channel) { return channel >= 0 && channel < C; };
  check(std::all_of(filters.channels, filters.channels + filters.count, inside), "channels must be from 0 to ", C - 1);
  return filters;
}

MaskedFilters masked_filters(const Tensor& weight, const Tensor& mask, bool transposed) {
  const int64_t C = weight.size(1);
  const uint8_t* const kept = reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>());
  return {.weight = weight_of(weight, transposed),
          .mask = transposed ? kept + 8 : kept,
          .out_stride = transposed ? 9 : 9 * C,
          .in_stride = transposed ? 9 * C : 9,
          .tap_stride = transposed ? -1 : 1};
}

Tensor masked_winograd_conv2d_weight_cpu(Tensor weight, Tensor mask, Tensor row_offsets, Tensor channels,
                                         int64_t oc_block, bool transposed) {
  check_filters_3x3(weight);
  check_size("mask", mask, {weight.size(0), weight.size(1), 3, 3});
  check(mask.scalar_type() == ScalarType::Bool, "mask must be bool, got ", mask.scalar_type());
  const int64_t K = weight.size(transposed ? 1 : 0), C = weight.size(transposed ? 0 : 1);
  const LiveFilters filters = check_live_filters(row_offsets, channels, oc_block, K, C);
  const std::array<int64_t, 3> size{kElements, filters.count, oc_block};
  const Tensor values = torch::stable::new_empty(weight, {size.data(), size.size()});
  if (values.numel() == 0) return values;
  std::vector<int32_t> rows(filters.count);
  for (int64_t row = 0; row < filters.oc_blocks; ++row)
    std::fill(rows.begin() + filters.row_offsets[row], rows.begin() + filters.row_offsets[row + 1],
              static_cast<int32_t>(row));
  const Tensor kept = torch::stable::contiguous(mask);
  const MaskedFilters source = masked_filters(weight, kept, transposed);
  float* const to = values.mutable_data_ptr<float>();
  const auto kernel = SPARSE_ADV_CHOOSE(masked_winograd_weight);
  parallel_for(0, filters.count, kFiltersOfTask,
               [&](int64_t begin, int64_t end) { kernel(source, filters, rows.data(), begin, end, to); });
  return values;
}

// The rows of tiles of an item: V should take a third of the L2 cache, as the sums M. With blocks of fewer than 4
// output channels a loaded vector serves few sums: items of twice as many tiles, two vectors at least, are faster,
// although V fills the cache (512 channels on 4 x 4 pixels, single filters: 16 tiles 5.4 ms, 32 tiles 3.7).
int64_t tile_rows_of_item(const TileGeometry& g, const LiveFilters& filters, int64_t tile_rows) {
  const int64_t groups = filters.oc_block < 4 ? 2 : 1, floats = groups * l2_bytes() / 4 / 3;
  const int64_t fitting = floats / (kElements * std::max<int64_t>(g.C, 1)) / kTileGroup * kTileGroup;
  const int64_t tiles = std::clamp<int64_t>(fitting, groups * kTileGroup, kMostTiles);
  const int64_t most = std::max<int64_t>(tiles / g.tile_cols, 1), threads = torch::stable::get_num_threads();
  return divide_up(tile_rows, divide_up(divide_up(tile_rows, most), threads) * threads);
}

int64_t channels_of_slice(int64_t tiles, int64_t K) {
  const int64_t fitting = l2_bytes() / 4 / 3 / (kElements * tiles) / 4 * 4;
  return std::min(std::max(fitting, kLeastOutChannels), round_up(K, 4));
}

void masked_winograd_conv2d_out_cpu(Tensor input, Tensor row_offsets, Tensor channels, Tensor values,
                                    std::vector<int64_t> padding, std::optional<Tensor> bias,
                                    std::optional<Tensor> residual, bool relu, std::optional<Tensor> gate, Tensor out,
                                    std::optional<Tensor> gate_out) {
  check(input.dim() == 4 && out.dim() == 4, "input and out must have 4 dimensions, got ", input.dim(), " and ",
        out.dim());
  check_float("input", input);
  check(input.is_contiguous(), "input must be contiguous, got strides ", text_of(input.strides()));
  check(out.is_contiguous(), "out must be contiguous, got strides ", text_of(out.strides()));
  const int64_t C = input.size(1), K = out.size(1);
  const std::array<int64_t, 4> size = output_size(input, padding, K);
  check(values.dim() == 3 && values.size(0) == kElements && values.is_contiguous(),
        "values must be those of masked_winograd_conv2d_weight, got size ", text_of(values.sizes()));
  check_dtype("values", values, "input", input);
  const LiveFilters filters = check_live_filters(row_offsets, channels, values.size(2), K, C);
  check_size("values", values, {kElements, filters.count, filters.oc_block});
  const EpilogueTensors epilogue{.bias = bias, .residual = residual, .relu = relu, .gate_out = gate_out, .gate = gate};
  check_size("bias", bias, {K});
  check_dtype("bias", bias, "input", input);
  check_activation(epilogue);
  check_out(out, size, "input", input, values, epilogue);
  check_is_not_written("row_offsets", row_offsets, out, epilogue);
  check_is_not_written("channels", channels, out, epilogue);
  if (out.numel() == 0) return;
  const EpilogueTensors operands = epilogue.laid_out_like(out);
  const Epilogue<float> pointers = operands.pointers<float>(out);
  const float *const images = input.const_data_ptr<float>(), *const weights = values.const_data_ptr<float>();
  float* const results = out.mutable_data_ptr<float>();

  const TileGeometry g({input.sizes().begin(), input.sizes().end()}, padding,
                       SPARSE_ADV_CHOOSE(masked_winograd_joined_tiles)());
  const int64_t tile_rows = size[0] * g.tile_rows, rows = tile_rows_of_item(g, filters, tile_rows);
  const ConvSizes sizes{.C = C,
                        .K = K,
                        .input_pixels = g.H * g.W,
                        .input_row_size = g.W,
                        .output_pixels = g.P * g.Q,
                        .output_row_size = g.Q,
                        .slice = channels_of_slice(round_up(rows * g.tile_cols, kTileGroup), K)};
  const auto kernel = SPARSE_ADV_CHOOSE(masked_winograd_item);
  const int64_t count = divide_up(tile_rows, rows);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  SharedItems items(count, threads);
  parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    ScratchUse scratch;
    ItemTables tables(g);
    items.take(thread, [&](int64_t i) {
      const TileItem item = tables.build(i * rows, std::min((i + 1) * rows, tile_rows));
      kernel(sizes, filters, weights, item, images, results, pointers, scratch.at_least(sizes.scratch(item)));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_winograd_conv2d_weight", SPARSE_ADV_BOX(&masked_winograd_conv2d_weight_cpu));
  m.impl("masked_winograd_conv2d_out", SPARSE_ADV_BOX(&masked_winograd_conv2d_out_cpu));
}

}  // namespace sparse_adv
