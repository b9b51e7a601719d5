#include "cpu/masked_conv2d/dense.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <array>
#include <bit>
#include <optional>

#include "common/layout.h"
#include "common/parallel.h"
#include "cpu/pointwise.h"

namespace sparse_adv {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Calls an ATen op by name and returns its outputs, which are `results` in number.
template <size_t results, class... Args>
std::array<StableIValue, results> call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > results ? sizeof...(Args) : results)> stack{
      torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, results> outputs;
  std::copy_n(stack.begin(), results, outputs.begin());
  return outputs;
}

template <class... Args>
Tensor call_tensor(const char* op, const char* overload, const Args&... args) {
  return torch::stable::detail::to<Tensor>(call<1>(op, overload, args...)[0]);
}

// Selects and does not multiply, because NaN * 0 and infinity * 0 are NaN: whatever a pruned weight is, it counts as 0.
// PyTorch's `where`, or a `?` here, branches at each element: 2 to 5 ns where no processor foresees the mask.
float kept_or_zero(float weight, bool kept) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(weight) & (0u - uint32_t{kept}));
}

bool has_fast_selection(const Pattern& pattern, const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Float && pattern.mask.is_contiguous();
}

Tensor zero_pruned_by_torch(const Pattern& pattern, const Tensor& weight) {
  return call_tensor("aten::where", "self", pattern.mask, weight, torch::stable::new_zeros(weight, {}));
}

// Of contiguous elements; `to` may be `from`.
void zero_pruned_into(const Pattern& pattern, const float* from, float* to) {
  const bool* const kept = pattern.mask.const_data_ptr<bool>();
  parallel_for(0, pattern.mask.numel(), kElementwiseGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = kept_or_zero(from[i], kept[i]);
  });
}

// A contiguous tensor, whatever the strides of the weight.
Tensor zero_pruned(const Pattern& pattern, const Tensor& weight) {
  if (!has_fast_selection(pattern, weight)) return zero_pruned_by_torch(pattern, weight);
  Tensor result = torch::stable::new_empty(weight, weight.sizes());
  const float* const from = weight.const_data_ptr<float>();
  float* const to = result.mutable_data_ptr<float>();
  if (weight.is_contiguous()) {
    zero_pruned_into(pattern, from, to);
    return result;
  }
  const bool* const kept = pattern.mask.const_data_ptr<bool>();
  // In the order of a channels_last weight.
  const int64_t channels = pattern.group_in_channels, taps = pattern.taps(), size = channels * taps;
  const int64_t out_stride = weight.stride(0), in_stride = weight.stride(1);
  parallel_for(0, pattern.out_channels, kElementwiseGrain / std::max<int64_t>(size, 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin; k < end; ++k)
                   for (int64_t tap = 0; tap < taps; ++tap) {
                     const int64_t r = tap / pattern.filter_cols, s = tap % pattern.filter_cols;
                     const float* const first = from + k * out_stride + r * weight.stride(2) + s * weight.stride(3);
                     for (int64_t c = 0; c < channels; ++c) {
                       const int64_t at = k * size + c * taps + tap;
                       to[at] = kept_or_zero(first[c * in_stride], kept[at]);
                     }
                   }
               });
  return result;
}

// The same for a new tensor of any strides, in its own memory where that is possible.
Tensor with_pruned_zeroed(const Pattern& pattern, const Tensor& tensor) {
  Tensor result = torch::stable::contiguous(tensor);
  if (!has_fast_selection(pattern, result)) return zero_pruned_by_torch(pattern, result);
  zero_pruned_into(pattern, result.const_data_ptr<float>(), result.mutable_data_ptr<float>());
  return result;
}

Tensor masked(const Pattern& pattern, const Tensor& weight) {
  return pattern.weight_is_masked ? weight : zero_pruned(pattern, weight);
}

// The stable ABI cannot pass a Scalar, which aten::add needs; subtract has a C function of its own.
Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

Sizes to_vector(const std::array<int64_t, 2>& pair) { return {pair[0], pair[1]}; }

// Faults of oneDNN (of torch 2.13) that these functions go around:
// - It ends the process where some window lies in the padding: in 16 bits, and in any dtype where there is a bias.
// - Of images or weights in channels_last with one input channel, it reads memory that nobody wrote where a stride
//   leaves one column of output pixels. In bfloat16 results are wrong there with more channels too, and the weight's
//   gradient also with two columns.
bool leaves_columns(const ConvParams& conv, int64_t count) { return conv.Q <= count && conv.stride[1] > 1; }

// The dtype in which PyTorch computes a convolution of tensors like this one.
ScalarType safe_dtype(const ConvParams& conv, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) return dtype;
  return conv.every_window_reads() && !leaves_columns(conv, 2) ? dtype : ScalarType::Float;
}

// A copy in NCHW. `contiguous` takes some channels_last tensors of one channel for such.
Tensor nchw_copy(const Tensor& tensor) {
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor along_channels(const ConvParams& conv, const Tensor& vector) {
  const std::array<int64_t, 4> size{1, conv.K, 1, 1};
  return torch::stable::reshape(vector, {size.data(), size.size()});
}

Tensor forward(const ConvParams& conv, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType dtype = safe_dtype(conv, input);
  const auto own_bias = bias ? std::optional(torch::stable::to(*bias, dtype)) : std::nullopt;
  const bool adds_bias = conv.every_window_reads();
  Tensor images = torch::stable::to(input, dtype), filters = torch::stable::to(weight, dtype);
  if (leaves_columns(conv, 1)) {
    images = nchw_copy(images);
    filters = nchw_copy(filters);
  }
  Tensor output =
      call_tensor("aten::convolution", "", images, filters, adds_bias ? own_bias : std::nullopt, to_vector(conv.stride),
                  to_vector(conv.padding), to_vector(conv.dilation), false, Sizes{0, 0}, conv.groups);
  if (bias && !adds_bias) output = add(output, along_channels(conv, *own_bias));
  return torch::stable::to(output, input.scalar_type());
}

// Whether oneDNN may end the process: its AVX2 kernel of the weight's gradient (of torch 2.13) writes out of bounds in
// strided 1 x 1 convolutions of fewer than 8 channels, where the images or the weight are channels_last.
bool grad_weight_writes_out_of_bounds(const ConvParams& conv) {
  return conv.C < 8 && conv.groups == 1 && conv.R == 1 && conv.S == 1 && conv.stride[0] * conv.stride[1] > 1 &&
         conv.padding[0] == 0 && conv.padding[1] == 0;
}

// The pixels that a 1 x 1 convolution without padding reads: on them alone it has stride 1.
Tensor pixels_read(const ConvParams& conv, const Tensor& input) {
  Tensor pixels = input;
  for (int64_t axis : {0, 1}) {
    const std::optional<int64_t> start, end;
    pixels = call_tensor("aten::slice", "Tensor", pixels, axis + 2, start, end, conv.stride[axis]);
  }
  return pixels;
}

// convolution_backward; `which` is 0 for the input's gradient and 1 for the weight's. grad_output has a safe dtype,
// which the result has too.
Tensor backward(const ConvParams& conv, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                int which) {
  const ScalarType dtype = grad_output.scalar_type();
  const std::array<bool, 3> output_mask{which == 0, which == 1, false};
  auto outputs = call<3>("aten::convolution_backward", "", grad_output, torch::stable::to(input, dtype),
                         torch::stable::to(weight, dtype), std::optional<Sizes>{}, to_vector(conv.stride),
                         to_vector(conv.padding), to_vector(conv.dilation), false, Sizes{0, 0}, conv.groups,
                         torch::headeronly::HeaderOnlyArrayRef<bool>(output_mask.data(), output_mask.size()));
  std::array<Tensor, 3> gradients;
  for (int i = 0; i < 3; ++i) gradients[i] = torch::stable::detail::to<Tensor>(outputs[i]);
  return gradients[which];
}

// Applies an epilogue: the new tensor `sum` becomes the result, or is written to `out` in one pass. The
// result has the layout of out, or that of an output for the images `like`.
Tensor finish(const Tensor& like, const Tensor& sum, const EpilogueTensors& epilogue,
              const std::optional<Tensor>& out) {
  const Tensor laid_out = in_layout_of(out.value_or(like), sum);
  Tensor result = out.value_or(laid_out);
  if (out || epilogue.scale || epilogue.bias || epilogue.residual || epilogue.relu || epilogue.gate)
    pointwise_into(result, laid_out, epilogue);
  return result;
}

}  // namespace

// The convolution adds the bias itself, unless a scale precedes it.
Tensor dense_conv2d(const ConvParams& conv, const Pattern& pattern, const Tensor& input, const Tensor& weight,
                    const EpilogueTensors& epilogue, const std::optional<Tensor>& out) {
  const bool adds_bias = !epilogue.scale;
  EpilogueTensors rest = epilogue;
  if (adds_bias) rest.bias = std::nullopt;
  return finish(input, forward(conv, input, masked(pattern, weight), adds_bias ? epilogue.bias : std::nullopt), rest,
                out);
}

Tensor dense_conv2d_grad_input(const ConvParams& conv, const Pattern& pattern, const Tensor& grad_output,
                               const Tensor& weight, const EpilogueTensors& epilogue,
                               const std::optional<Tensor>& out) {
  const Tensor grad = torch::stable::to(grad_output, safe_dtype(conv, grad_output));
  // Only the shape of the input is used.
  const Tensor input = empty_in_layout_of(grad, {conv.N, conv.C, conv.H, conv.W});
  const Tensor gradient = backward(conv, grad, input, masked(pattern, weight), 0);
  return finish(grad_output, torch::stable::to(gradient, grad_output.scalar_type()), epilogue, out);
}

Tensor dense_conv2d_grad_weight(const ConvParams& conv, const Pattern& pattern, const Tensor& grad_output,
                                const Tensor& input) {
  if (grad_weight_writes_out_of_bounds(conv)) {
    ConvParams unstrided = conv;
    unstrided.stride = {1, 1};
    return dense_conv2d_grad_weight(unstrided, pattern, grad_output, pixels_read(conv, input));
  }
  const Tensor grad = torch::stable::to(grad_output, safe_dtype(conv, grad_output));
  // Only the shape of the weight is used.
  const std::array<int64_t, 4> size{conv.K, pattern.group_in_channels, conv.R, conv.S};
  const Tensor weight = torch::stable::new_empty(grad, {size.data(), size.size()});
  return torch::stable::to(with_pruned_zeroed(pattern, backward(conv, grad, input, weight, 1)), input.scalar_type());
}

}  // namespace sparse_adv
