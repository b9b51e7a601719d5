// The ops `batch_norm_act` and `batch_norm_act_grad`: BatchNorm with the statistics of the batch, residual and ReLU.
//
// A thread takes a few channels of NCHW tensors through both passes over them, the sums and the result, so that the
// second pass finds them in the cache. channels_last tensors, where a channel is in every cache line, are read twice.
// The order in which a channel's elements are added does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/errors.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "common/tensor_checks.h"
#include "cpu/batch_norm_act_kernel.h"
#include "cpu/epilogue_tensors.h"
#include "cpu/pointwise_kernel.h"
#include "cpu/staging.h"

namespace sparse_adv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Chosen, not tuned.
constexpr int64_t kBytesInRow = 1024;  // of consecutive memory that a thread reads at least, if the images are NCHW
constexpr int64_t kPixels = 512;       // of channels_last images that are summed in one piece
constexpr int64_t kFirstPixels = 64;   // of channels_last images whose mean is subtracted before summing

// Moves a shift, the negative of some value of each channel, to the negative of the mean of `count` elements, from the
// sums of their differences.
template <class T>
void move_shift(T* shift, int64_t begin, int64_t end, const std::vector<double>& sums, int64_t count) {
  for (int64_t c = begin; c < end; ++c) shift[c] -= static_cast<T>(sums[c] / static_cast<double>(count));
}

// channels_last: see in_two_passes.
template <class T, class Finish, class Apply>
void sum_pixels_then_apply(const BatchNormSums<T>& operands, int64_t images, int64_t pixels, T* shift,
                           const Finish& finish, const Apply& apply) {
  const auto sums = SPARSE_ADV_CHOOSE(batch_norm_pixel_sums<T>);
  const int64_t channels = operands.runs.channels, all = images * pixels, pieces = divide_up(all, kPixels);
  std::vector<double> first(channels), second(channels);
  if (shift) {
    const int64_t count = std::min(all, kFirstPixels);
    std::vector<T> scratch(2 * channels);
    for (int64_t c = 0; c < channels; ++c) shift[c] = -operands.input[c];
    sums(operands, 0, count, scratch.data(), first.data(), second.data());
    move_shift(shift, 0, channels, first, count);
  }
  std::vector<double> parts(2 * channels * pieces);
  const int64_t grain = std::max<int64_t>(1, kElementwiseGrain / (kPixels * channels));
  parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * channels);
    for (int64_t piece = begin; piece < end; ++piece) {
      double* const part = parts.data() + 2 * channels * piece;
      sums(operands, piece * kPixels, std::min(all, (piece + 1) * kPixels), scratch.data(), part, part + channels);
    }
  });
  std::fill(first.begin(), first.end(), 0.0);
  std::fill(second.begin(), second.end(), 0.0);
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t c = 0; c < channels; ++c) {
      first[c] += parts[2 * channels * piece + c];
      second[c] += parts[2 * channels * piece + channels + c];
    }
  finish(0, channels, first.data(), second.data());
  parallel_for(0, all, std::max<int64_t>(1, kElementwiseGrain / channels), apply);
}

// NCHW: see in_two_passes.
template <class T, class Finish, class Apply>
void sum_channels_then_apply(const BatchNormSums<T>& operands, int64_t images, int64_t pixels, T* shift,
                             const Finish& finish, const Apply& apply) {
  const auto sums = SPARSE_ADV_CHOOSE(batch_norm_channel_sums<T>);
  const int64_t channels = operands.runs.channels, bytes = pixels * static_cast<int64_t>(sizeof(T));
  const int64_t together = std::clamp<int64_t>(divide_up(kBytesInRow, bytes), 1, kChannelsTogether);
  const int64_t groups = divide_up(channels, together);
  const int64_t grain = std::max<int64_t>(1, kElementwiseGrain / (together * images * pixels));
  std::vector<double> first(channels), second(channels);
  parallel_for(0, groups, grain, [&](int64_t group, int64_t last_group) {
    for (; group < last_group; ++group) {
      const int64_t begin = group * together, end = std::min(channels, begin + together);
      if (shift) {
        for (int64_t c = begin; c < end; ++c) shift[c] = -operands.input[c * pixels];
        sums(operands, 1, begin, end, first.data(), second.data());
        move_shift(shift, begin, end, first, pixels);
      }
      sums(operands, images, begin, end, first.data(), second.data());
      finish(begin, end, first.data(), second.data());
      for (int64_t image = 0; image < images; ++image) apply(image * channels + begin, image * channels + end);
    }
  });
}

// Calls finish(begin, end, first, second) with the sums of the channels from `begin` to `end` - 1 once they are
// complete, and then apply(begin, end) for all their runs. If `shift` is given, it receives the operands' minus_shift:
// the mean of a first part of the batch.
template <class T, class Finish, class Apply>
void in_two_passes(const BatchNormSums<T>& operands, int64_t images, int64_t pixels, T* shift, const Finish& finish,
                   const Apply& apply) {
  if (operands.runs.channels_last)
    sum_pixels_then_apply(operands, images, pixels, shift, finish, apply);
  else
    sum_channels_then_apply(operands, images, pixels, shift, finish, apply);
}

// NCHW: the same channel of the next image is visited next.
Runs channel_runs_of(const Tensor& tensor, bool has_gate) {
  Runs runs = runs_of(tensor, has_gate);
  if (!runs.channels_last) runs.ahead = runs.channels * runs.size();
  return runs;
}

// BatchNorm's vectors are in the dtype of the arithmetic.
Tensor vector_like(const Tensor& staging) { return torch::stable::new_empty(staging, {staging.size(1)}); }

std::optional<Tensor> vector_for(const std::optional<Tensor>& vector, const Tensor& staging) {
  if (!vector) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*vector, staging.scalar_type()));
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

void check_input(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  check(input.dim() == 4, "input must have 4 dimensions, got ", input.dim());
  check_floating("input", input, input);
  for (const auto& [name, vector] : {std::pair{"weight", weight}, std::pair{"bias", bias}}) {
    check_size(name, vector, {input.size(1)});
    if (vector) check_floating(name, *vector, input);
  }
}

template <class T>
void forward(const Tensor& out, const Tensor& input, const EpilogueTensors& epilogue, const Tensor& mean,
             const Tensor& var, double eps) {
  const int64_t N = out.size(0), C = out.size(1), pixels = out.size(2) * out.size(3);
  const double count = static_cast<double>(N * pixels);
  const T *const weight = data_of<T>(epilogue.scale), *const bias = data_of<T>(epilogue.bias);
  std::vector<T> minus_shift(C), scale(C), offset(C);
  const Runs runs = channel_runs_of(out, epilogue.gate_out.has_value());
  const T* const x = input.const_data_ptr<T>();
  Pointwise<T> affine{
      .input = x, .out = out.mutable_data_ptr<T>(), .epilogue = epilogue.pointers<T>(out), .runs = runs};
  affine.epilogue.scale = scale.data();
  affine.epilogue.bias = offset.data();
  T *const means = mean.mutable_data_ptr<T>(), *const vars = var.mutable_data_ptr<T>();
  const auto apply = SPARSE_ADV_CHOOSE(pointwise<T>);
  in_two_passes<T>(
      {.runs = runs, .input = x, .minus_shift = minus_shift.data()}, N, pixels, minus_shift.data(),
      [&](int64_t begin, int64_t end, const double* first, const double* second) {
        for (int64_t c = begin; c < end; ++c) {
          const double from_shift = first[c] / count, mean_of_c = from_shift - minus_shift[c];
          const double variance = second[c] / count - from_shift * from_shift;
          const double var_of_c = variance < 0 ? 0 : variance;  // NaN stays
          const double factor = (weight ? weight[c] : 1) / std::sqrt(var_of_c + eps);
          means[c] = static_cast<T>(mean_of_c);
          vars[c] = static_cast<T>(var_of_c);
          scale[c] = static_cast<T>(factor);
          offset[c] = static_cast<T>((bias ? bias[c] : 0) - mean_of_c * factor);
        }
      },
      [&](int64_t begin, int64_t end) { apply(affine, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_cpu(Tensor input, std::optional<Tensor> residual,
                                                              std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                              double eps, bool relu) {
  check_input(input, weight, bias);
  Tensor out = empty_in_layout_of(input, {input.size(0), input.size(1), input.size(2), input.size(3)});
  if (residual) {
    check_size("residual", residual, {input.sizes().begin(), input.sizes().end()});
    check_dtype("residual", residual, "input", input);
  }
  const Tensor staging = staging_for(out, true);
  Tensor mean = vector_like(staging), var = vector_like(staging);
  std::vector<int64_t> size{0};
  if (relu) {
    const auto sizes = gate_size(out);
    size.assign(sizes.begin(), sizes.end());
  }
  Tensor gate = torch::stable::new_empty(out, {size.data(), size.size()}, ScalarType::Byte);
  if (out.numel() == 0) return {out, torch::stable::zero_(mean), torch::stable::zero_(var), gate};
  EpilogueTensors operands{.scale = vector_for(weight, staging), .bias = vector_for(bias, staging), .relu = relu};
  if (residual) operands.residual = staged(*residual, staging);
  if (relu) operands.gate_out = gate;
  (is_double(staging) ? &forward<double> : &forward<float>)(staging, staged(input, staging), operands, mean, var, eps);
  unstage(staging, out);
  return {out, mean, var, gate};
}

struct Backward {
  Tensor grad, input, mean, var;
  std::optional<Tensor> weight, gate;
  double eps;
  Tensor grad_input, grad_weight, grad_bias;
  std::optional<Tensor> grad_residual;
};

template <class T>
void backward(const Backward& tensors) {
  const Tensor& out = tensors.grad_input;
  const int64_t N = out.size(0), C = out.size(1), pixels = out.size(2) * out.size(3);
  const double count = static_cast<double>(N * pixels);
  const T *const mean = tensors.mean.const_data_ptr<T>(), *const var = tensors.var.const_data_ptr<T>();
  const T* const weight = data_of<T>(tensors.weight);
  std::vector<T> minus_mean(C), scale(C), slope(C), offset(C);
  std::transform(mean, mean + C, minus_mean.begin(), [](T x) { return -x; });
  const BatchNormGradInput<T> operands{
      .operands = {.runs = channel_runs_of(out, tensors.gate.has_value()),
                   .input = tensors.input.const_data_ptr<T>(),
                   .minus_shift = minus_mean.data(),
                   .grad = tensors.grad.const_data_ptr<T>(),
                   .gate = data_of<uint8_t>(tensors.gate)},
      .scale = scale.data(),
      .slope = slope.data(),
      .offset = offset.data(),
      .grad_input = out.mutable_data_ptr<T>(),
      .grad_residual = tensors.grad_residual ? tensors.grad_residual->mutable_data_ptr<T>() : nullptr};
  T *const grad_weight = tensors.grad_weight.mutable_data_ptr<T>(), *const grad_bias =
                                                                        tensors.grad_bias.mutable_data_ptr<T>();
  const auto apply = SPARSE_ADV_CHOOSE(batch_norm_grad_input<T>);
  in_two_passes<T>(
      operands.operands, N, pixels, nullptr,
      [&](int64_t begin, int64_t end, const double* first, const double* second) {
        for (int64_t c = begin; c < end; ++c) {
          const double inverse = 1 / std::sqrt(var[c] + tensors.eps), factor = (weight ? weight[c] : 1) * inverse;
          grad_weight[c] = static_cast<T>(second[c] * inverse);
          grad_bias[c] = static_cast<T>(first[c]);
          scale[c] = static_cast<T>(factor);
          slope[c] = static_cast<T>(-factor * inverse * inverse * second[c] / count);
          offset[c] = static_cast<T>(-factor * first[c] / count);
        }
      },
      [&](int64_t begin, int64_t end) { apply(operands, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_grad_cpu(Tensor grad_output, Tensor input,
                                                                   std::optional<Tensor> weight, Tensor mean,
                                                                   Tensor var, std::optional<Tensor> gate, double eps,
                                                                   bool needs_residual) {
  check_input(input, weight, std::nullopt);
  check_size("grad_output", grad_output, {input.sizes().begin(), input.sizes().end()});
  check_dtype("grad_output", grad_output, "input", input);
  Tensor grad_input = empty_in_layout_of(input, {input.size(0), input.size(1), input.size(2), input.size(3)});
  check_gate("gate", gate, grad_input);
  const Tensor staging = staging_for(grad_input, true);
  for (const auto& [name, vector] : {std::pair{"mean", mean}, std::pair{"var", var}}) {
    check_size(name, vector, {input.size(1)});
    check(vector.scalar_type() == staging.scalar_type() && vector.is_contiguous(), name,
          " must be contiguous and in the dtype of the arithmetic, ", staging.scalar_type(), ", got ",
          vector.scalar_type());
  }
  Tensor grad_residual =
      needs_residual ? torch::stable::empty_like(grad_input) : torch::stable::new_empty(grad_input, {0});
  Backward tensors{.grad = grad_output,
                   .input = input,
                   .mean = mean,
                   .var = var,
                   .weight = vector_for(weight, staging),
                   .gate = gate,
                   .eps = eps,
                   .grad_input = staging,
                   .grad_weight = vector_like(staging),
                   .grad_bias = vector_like(staging),
                   .grad_residual = std::nullopt};
  if (grad_input.numel() == 0)
    return {grad_input, torch::stable::zero_(tensors.grad_weight), torch::stable::zero_(tensors.grad_bias),
            grad_residual};
  tensors.grad = staged(grad_output, staging);
  tensors.input = staged(input, staging);
  if (needs_residual) tensors.grad_residual = staging_for(grad_residual, true);
  (is_double(staging) ? &backward<double> : &backward<float>)(tensors);
  unstage(staging, grad_input);
  if (needs_residual) unstage(*tensors.grad_residual, grad_residual);
  return {grad_input, tensors.grad_weight, tensors.grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("batch_norm_act", SPARSE_ADV_BOX(&batch_norm_act_cpu));
  m.impl("batch_norm_act_grad", SPARSE_ADV_BOX(&batch_norm_act_grad_cpu));
}

}  // namespace sparse_adv
