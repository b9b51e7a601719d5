// The ops `winograd_conv2d`, `winograd_conv2d_grad_weight`, `winograd_conv2d_weight` and `winograd_conv2d_out`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/errors.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "common/tensor_checks.h"
#include "cpu/aligned_buffer.h"
#include "cpu/epilogue_tensors.h"
#include "cpu/winograd_conv2d/conv_kernel.h"
#include "cpu/winograd_conv2d/grad_weight_kernel.h"
#include "cpu/winograd_conv2d/operands.h"
#include "cpu/work_stealing.h"

namespace sparse_adv {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

namespace {

// Tiles that a thread transforms at a time. All their products with the weights follow at once, so weights that stay in
// the L2 cache want few tiles, which then stay there too, and larger ones, which come from the L3 cache, want many.
// Measured: 64 channels 10.8 ms with 24 tiles and 12.3 with 192, 256 channels 10.6 and 7.8.
constexpr int64_t kFewTiles = 24, kManyTiles = 192;
// The gradient of weights: 64 channels 14.5 ms with 72 tiles, 20.4 with 192.
constexpr int64_t kGradTiles = 72;
// Floats, 2.5 MB: between the weights of 64 channels (0.6 MB), which want few tiles, and those of 256 (9.4 MB).
constexpr int64_t kLargeWeights = 640 * 1024;
// Chosen, not tuned.
constexpr int64_t kWeightGrain = 16;     // input channels of a panel, for a thread at least
constexpr int64_t kGradTileGrain = 4;    // tiles that a thread transforms for the gradient of weights, at least
constexpr int64_t kChannelsOfPart = 48;  // input channels of an element that a thread multiplies: four register blocks
// Floats of transformed weights, or of their gradient, that are in memory at a time. An AlignedBuffer keeps so many
// between calls. All of 512 x 512 channels would take 38 MB, which the system maps, clears and unmaps in each call.
constexpr int64_t kTransformedAtOnce = 4 << 20;

// With one channel or one pixel, or none, NCHW is the same memory.
void check_channels_last(const char* name, const Tensor& tensor) {
  const bool is_both = tensor.is_contiguous() && (tensor.size(1) == 1 || tensor.size(2) * tensor.size(3) == 1);
  check(is_channels_last(tensor) || is_both || tensor.numel() == 0, name,
        " must be channels_last without gaps, got strides ", text_of(tensor.strides()));
}

void check_tile(int64_t tile) { check(tile == 2 || tile == 4, "tile must be 2 or 4, got ", tile); }

void transform(const WinogradWeight& weight, int64_t tile, float* to) {
  const int64_t panels = divide_up(weight.out_channels, kPanel), channels = weight.in_channels;
  const auto kernel = SPARSE_ADV_CHOOSE(winograd_weight);
  parallel_for(0, panels * channels, kWeightGrain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin / channels; panel * channels < end; ++panel)
      kernel(weight, tile, panel, std::max<int64_t>(begin - panel * channels, 0),
             std::min(end - panel * channels, channels), to);
  });
}

Tensor winograd_conv2d_weight_cpu(Tensor weight, int64_t tile, bool transposed) {
  check_filters_3x3(weight);
  check_tile(tile);
  const WinogradWeight operand = weight_of(weight, transposed);
  const std::array<int64_t, 4> size{(tile + 2) * (tile + 2), divide_up(operand.out_channels, kPanel),
                                    operand.in_channels, kPanel};
  const Tensor out = torch::stable::new_empty(weight, {size.data(), size.size()});
  if (out.numel() != 0) transform(operand, tile, out.mutable_data_ptr<float>());
  return out;
}

Winograd winograd_of(const Tensor& input, const std::array<int64_t, 4>& out, const std::vector<int64_t>& padding,
                     int64_t tile) {
  return {.tile = tile,
          .H = input.size(2),
          .W = input.size(3),
          .C = input.size(1),
          .P = out[2],
          .Q = out[3],
          .K = out[1],
          .pixel_stride = out[1],
          .pad_rows = padding[0],
          .pad_cols = padding[1],
          .tile_rows = divide_up(out[2], tile),
          .tile_cols = divide_up(out[3], tile),
          .panels = divide_up(out[1], kPanel)};
}

int64_t elements_of(const Winograd& conv) { return (conv.tile + 2) * (conv.tile + 2); }

// Of its weights, in floats.
int64_t transformed_size(const Winograd& conv) { return elements_of(conv) * conv.panels * conv.C * kPanel; }

// Calls body(part, first) for parts of the output channels, of nearly equal size, which begin with channel `first`.
template <class Body>
void for_each_part(const Winograd& conv, const Body& body) {
  const int64_t size_of_panel = std::max<int64_t>(elements_of(conv) * conv.C * kPanel, 1);
  const int64_t parts = divide_up(conv.panels, std::max<int64_t>(kTransformedAtOnce / size_of_panel, 1));
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = i * conv.panels / parts, end = (i + 1) * conv.panels / parts;
    Winograd part = conv;
    part.panels = end - begin;
    part.K = std::min(end * kPanel, conv.K) - begin * kPanel;
    body(part, begin * kPanel);
  }
}

// Computes `tiles` tiles; the weights are transformed.
void convolve(const Winograd& conv, int64_t tiles, const float* input, const float* weight, float* out,
              const Epilogue<float>& epilogue) {
  const int64_t scratch_of_tile = elements_of(conv) * (conv.C + conv.panels * kPanel);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = transformed_size(conv) < kLargeWeights ? kFewTiles : kManyTiles;
  const int64_t chunk = divide_up(tiles, divide_up(divide_up(tiles, most), threads) * threads);
  const auto kernel = SPARSE_ADV_CHOOSE(winograd_tiles);
  const int64_t count = divide_up(tiles, chunk);
  SharedItems chunks(count, threads);
  parallel_for(0, std::min(threads, count), 1, [&](int64_t thread, int64_t) {
    ScratchUse scratch;
    chunks.take(thread, [&](int64_t i) {
      kernel(conv, input, weight, out, epilogue, i * chunk, std::min(tiles, (i + 1) * chunk),
             scratch.at_least(chunk * scratch_of_tile));
    });
  });
}

Winograd check_operands(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& padding,
                        const Tensor& out) {
  check(input.dim() == 4 && out.dim() == 4, "input and out must have 4 dimensions, got ", input.dim(), " and ",
        out.dim());
  check_float("input", input);
  check_channels_last("input", input);
  const std::array<int64_t, 4> size = output_size(input, padding, out.size(1));
  check(weight.dim() == 4 && (weight.size(0) == 16 || weight.size(0) == 36),
        "weight must be a result of winograd_conv2d_weight, got size ", text_of(weight.sizes()));
  const Winograd conv = winograd_of(input, size, padding, weight.size(0) == 16 ? 2 : 4);
  check_size("weight", weight, {weight.size(0), conv.panels, conv.C, kPanel});
  check_dtype("weight", weight, "input", input);
  check(weight.is_contiguous(), "weight must be contiguous, got strides ", text_of(weight.strides()));
  check_size("out", out, {size.begin(), size.end()});
  check_channels_last("out", out);
  return conv;
}

void winograd_conv2d_out_cpu(Tensor input, Tensor weight, std::vector<int64_t> padding, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, bool relu, std::optional<Tensor> gate, Tensor out,
                             std::optional<Tensor> gate_out) {
  const Winograd conv = check_operands(input, weight, padding, out);
  const EpilogueTensors epilogue{.bias = bias, .residual = residual, .relu = relu, .gate_out = gate_out, .gate = gate};
  check_size("bias", bias, {conv.K});
  check_dtype("bias", bias, "input", input);
  check_activation(epilogue);
  check_out(out, {input.size(0), conv.K, conv.P, conv.Q}, "input", input, weight, epilogue);
  if (out.numel() == 0) return;
  check(!(gate || gate_out) || is_channels_last(out), "a gate needs an out of several channels and pixels, got ",
        text_of(out.sizes()));
  const EpilogueTensors operands = epilogue.laid_out_like(out);
  const Epilogue<float> pointers = operands.pointers<float>(out);
  convolve(conv, input.size(0) * conv.tile_rows * conv.tile_cols, input.const_data_ptr<float>(),
           weight.const_data_ptr<float>(), out.mutable_data_ptr<float>(), pointers);
}

Tensor winograd_conv2d_cpu(Tensor input, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> padding,
                           int64_t tile, bool transposed) {
  check_filters_3x3(weight);
  const int64_t C = weight.size(transposed ? 0 : 1), K = weight.size(transposed ? 1 : 0);
  check(weight.size(0) > 0, "weight must not be empty, got size ", text_of(weight.sizes()));
  check(input.dim() == 4 && input.size(1) == C, "input must be [N, ", C, ", H, W], got ", text_of(input.sizes()));
  check_float("input", input);
  check_tile(tile);
  check_size("bias", bias, {K});
  check_dtype("bias", bias, "input", input);
  const std::array<int64_t, 4> size = output_size(input, padding, K);
  const Tensor out = torch::stable::empty({size.data(), size.size()}, input.scalar_type(), std::nullopt, input.device(),
                                          std::nullopt, MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return in_layout_of(input, out);
  const Winograd conv = winograd_of(input, size, padding, tile);
  const Tensor images = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const EpilogueTensors epilogue = EpilogueTensors{.bias = bias}.laid_out_like(out);
  const float* const biases = epilogue.pointers<float>(out).bias;
  const WinogradWeight operand = weight_of(weight, transposed);
  thread_local AlignedBuffer buffer;
  ScratchUse scratch(buffer);
  for_each_part(conv, [&](const Winograd& part, int64_t first) {
    float* const transformed = scratch.at_least(transformed_size(part));
    WinogradWeight of_part = operand;
    of_part.first += first * operand.out_stride;
    of_part.out_channels = part.K;
    transform(of_part, tile, transformed);
    convolve(part, input.size(0) * conv.tile_rows * conv.tile_cols, images.const_data_ptr<float>(), transformed,
             out.mutable_data_ptr<float>() + first, {.bias = biases ? biases + first : nullptr});
  });
  return in_layout_of(input, out);
}

// Writes the gradient of the weights of a part, from the images and the gradients of `tiles` tiles.
void grad_weight_of_part(const Winograd& conv, int64_t tiles, const float* input, const float* grad,
                         float* grad_weight) {
  const int64_t elements = elements_of(conv), width = conv.panels * kPanel, most = std::min(tiles, kGradTiles);
  const int64_t z_size = elements * most * width;
  ScratchUse scratch;
  float* const sums = scratch.at_least(transformed_size(conv) + z_size + elements * most * conv.C);
  float* const z = sums + transformed_size(conv);
  float* const v = z + z_size;
  const auto transform_tile = SPARSE_ADV_CHOOSE(winograd_grad_tile);
  const auto multiply = SPARSE_ADV_CHOOSE(winograd_grad_multiply);
  const auto finish = SPARSE_ADV_CHOOSE(winograd_grad_taps);
  const int64_t parts = divide_up(conv.C, kChannelsOfPart);  // of an element's sums
  for (int64_t first = 0; first < tiles; first += most) {
    const int64_t count = std::min(most, tiles - first);
    parallel_for(0, count, kGradTileGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        transform_tile(conv, input, grad, first + i, count, v + i * conv.C, z + i * width);
    });
    parallel_for(0, elements * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t element = i / parts, channel = i % parts * kChannelsOfPart;
        multiply(conv, count, v + element * count * conv.C, z + element * count * width, channel,
                 std::min(channel + kChannelsOfPart, conv.C), first == 0, sums + element * conv.C * width);
      }
    });
  }
  parallel_for(0, conv.C, 1, [&](int64_t begin, int64_t end) { finish(conv, sums, begin, end, grad_weight); });
}

Tensor winograd_conv2d_grad_weight_cpu(Tensor grad_output, Tensor input, std::vector<int64_t> padding, int64_t tile) {
  check(input.dim() == 4 && grad_output.dim() == 4, "input and grad_output must have 4 dimensions, got ", input.dim(),
        " and ", grad_output.dim());
  check_float("input", input);
  check_float("grad_output", grad_output);
  check_tile(tile);
  const std::array<int64_t, 4> size = output_size(input, padding, grad_output.size(1));
  check_size("grad_output", grad_output, {size.begin(), size.end()});
  const Winograd conv = winograd_of(input, size, padding, tile);
  const std::array<int64_t, 4> weight_size{conv.K, conv.C, 3, 3};
  Tensor grad_weight = torch::stable::new_empty(input, {weight_size.data(), weight_size.size()});
  if (grad_weight.numel() == 0) return grad_weight;
  if (grad_output.numel() == 0) return torch::stable::zero_(grad_weight);
  const Tensor images = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor gradients = torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast);
  for_each_part(conv, [&](const Winograd& part, int64_t first) {
    grad_weight_of_part(part, input.size(0) * conv.tile_rows * conv.tile_cols, images.const_data_ptr<float>(),
                        gradients.const_data_ptr<float>() + first,
                        grad_weight.mutable_data_ptr<float>() + first * conv.C * 9);
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("winograd_conv2d", SPARSE_ADV_BOX(&winograd_conv2d_cpu));
  m.impl("winograd_conv2d_grad_weight", SPARSE_ADV_BOX(&winograd_conv2d_grad_weight_cpu));
  m.impl("winograd_conv2d_weight", SPARSE_ADV_BOX(&winograd_conv2d_weight_cpu));
  m.impl("winograd_conv2d_out", SPARSE_ADV_BOX(&winograd_conv2d_out_cpu));
}

}  // namespace sparse_adv
