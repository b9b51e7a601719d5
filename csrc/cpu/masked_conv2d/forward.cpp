#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/errors.h"
#include "common/layout.h"
#include "common/tensor_checks.h"
#include "cpu/epilogue_tensors.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/dense.h"
#include "cpu/masked_conv2d/plan.h"
#include "cpu/masked_conv2d/sparse.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

Tensor sparse_conv2d(const ConvParams& conv, const Pattern& pattern, const Blocking& blocking, const Tensor& input,
                     const Tensor& weight, const EpilogueTensors& epilogue, const std::optional<Tensor>& out) {
  const Tensor source = in_plain_layout(input);
  Tensor output = out ? *out : empty_in_layout_of(source, {conv.N, conv.K, conv.P, conv.Q});
  const EpilogueTensors operands = epilogue.laid_out_like(output);
  run_sparse_conv({.csr = pattern.forward_csr(),
                   .weight = WeightLayout::forward(weight, pattern),
                   .blocking = blocking,
                   .source = source,
                   .epilogue = operands.pointers<float>(output)},
                  output);
  return output;
}

// Returns the result in `out`, or in a new tensor without `out`.
Tensor convolve(const Tensor& input, const Tensor& weight, const std::vector<Tensor>& pattern_tensors,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, int64_t groups, const EpilogueTensors& epilogue,
                const std::optional<Tensor>& out) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const ConvParams conv =
      make_conv_params(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding, dilation, groups);
  check_weight(pattern, weight, input);
  for (const auto& [name, vector] : {std::pair{"bias", &epilogue.bias}, std::pair{"scale", &epilogue.scale}}) {
    check_size(name, *vector, {conv.K});
    check_dtype(name, *vector, "input", input);
  }
  check_size("residual", epilogue.residual, {conv.N, conv.K, conv.P, conv.Q});
  check_dtype("residual", epilogue.residual, "input", input);
  if (out) {
    check_out(*out, {conv.N, conv.K, conv.P, conv.Q}, "input", input, weight, epilogue);
    check_is_not_written(pattern, *out, epilogue);
  }
  // PyTorch's convolution of no images returns a view, which autograd lets nobody write to.
  if (conv.N == 0) return out ? *out : empty_in_layout_of(input, {conv.N, conv.K, conv.P, conv.Q});
  const Plan plan =
      make_plan(pattern, conv, Pass::forward, input.scalar_type(),
                is_channels_last(input) || (out && is_channels_last(*out)), epilogue.gate_out || epilogue.gate);
  if (plan.kernel == Kernel::sparse) return sparse_conv2d(conv, pattern, *plan.blocking, input, weight, epilogue, out);
  return dense_conv2d(conv, pattern, input, weight, epilogue, out);
}

Tensor masked_conv2d_cpu(Tensor input, Tensor weight, std::vector<Tensor> pattern, std::optional<Tensor> bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, std::optional<Tensor> scale, std::optional<Tensor> residual, bool relu) {
  return convolve(input, weight, pattern, stride, padding, dilation, groups,
                  {.scale = scale, .bias = bias, .residual = residual, .relu = relu}, std::nullopt);
}

void masked_conv2d_out_cpu(Tensor input, Tensor weight, std::vector<Tensor> pattern, std::optional<Tensor> bias,
                           std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                           int64_t groups, std::optional<Tensor> residual, bool relu, Tensor out,
                           std::optional<Tensor> gate_out) {
  const EpilogueTensors epilogue{.bias = bias, .residual = residual, .relu = relu, .gate_out = gate_out};
  check_activation(epilogue);
  convolve(input, weight, pattern, stride, padding, dilation, groups, epilogue, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d", SPARSE_ADV_BOX(&masked_conv2d_cpu));
  m.impl("masked_conv2d_out", SPARSE_ADV_BOX(&masked_conv2d_out_cpu));
}

}  // namespace sparse_adv
