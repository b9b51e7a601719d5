#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/errors.h"
#include "common/layout.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/dense.h"
#include "cpu/masked_conv2d/plan.h"
#include "cpu/masked_conv2d/sparse.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

Tensor sparse_conv2d(const ConvParams& conv, const Pattern& pattern, const Blocking& blocking, const Tensor& input,
                     const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual, bool relu) {
  const Tensor source = in_plain_layout(input);
  Tensor output = empty_in_layout_of(source, {conv.N, conv.K, conv.P, conv.Q});
  // These copies must live until the kernels are done.
  const auto contiguous = [](const Tensor& vector) { return torch::stable::contiguous(vector); };
  const std::optional<Tensor> bias_data = bias ? std::optional(contiguous(*bias)) : std::nullopt;
  const std::optional<Tensor> scale_data = scale ? std::optional(contiguous(*scale)) : std::nullopt;
  const std::optional<Tensor> residual_data = residual ? std::optional(in_layout_of(output, *residual)) : std::nullopt;
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<float>() : nullptr;
  };
  run_sparse_conv(
      {.csr = pattern.forward_csr(),
       .weight = WeightLayout::forward(weight, pattern),
       .blocking = blocking,
       .source = source,
       .epilogue = {.scale = data(scale_data), .bias = data(bias_data), .residual = data(residual_data), .relu = relu}},
      output);
  return output;
}

Tensor masked_conv2d_cpu(Tensor input, Tensor weight, std::vector<Tensor> pattern_tensors, std::optional<Tensor> bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, std::optional<Tensor> scale, std::optional<Tensor> residual, bool relu) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const ConvParams conv =
      make_conv_params(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding, dilation, groups);
  check_weight(pattern, weight, input);
  for (const auto& vector : {bias, scale})
    check(!vector || (vector->dim() == 1 && vector->size(0) == conv.K && vector->scalar_type() == input.scalar_type()),
          "bias and scale must have one number per output channel, in the input's dtype");
  check(!residual || residual->scalar_type() == input.scalar_type(), "residual must have the input's dtype");
  check_size("residual", residual, {conv.N, conv.K, conv.P, conv.Q});
  const Plan plan = make_plan(pattern, conv, Pass::forward, input.scalar_type(), is_channels_last(input));
  if (plan.kernel == Kernel::sparse)
    return sparse_conv2d(conv, pattern, *plan.blocking, input, weight, bias, scale, residual, relu);
  return dense_conv2d(conv, pattern, input, weight, bias, scale, residual, relu);
}

std::vector<Tensor> pack_values_cpu(Tensor weight, std::vector<Tensor> pattern_tensors) {
  const Pattern pattern = read_pattern(pattern_tensors);
  check_size("weight", weight,
             {pattern.out_channels, pattern.group_in_channels, pattern.filter_rows, pattern.filter_cols});
  check(weight.scalar_type() == torch::headeronly::ScalarType::Float, "weight must be float32 to be packed");
  const auto packed = [&](const BlockCsr& csr, const WeightLayout& layout) {
    Tensor values = torch::stable::new_empty(weight, {csr.nnz * csr.oc_block});
    pack_values(csr, layout, values.mutable_data_ptr<float>());
    return values;
  };
  return {packed(pattern.forward_csr(), WeightLayout::forward(weight, pattern)),
          packed(pattern.grad_input_csr(), WeightLayout::grad_input(weight))};
}

std::vector<int64_t> masked_conv2d_plan_cpu(Tensor input, std::vector<Tensor> pattern_tensors,
                                            std::vector<int64_t> stride, std::vector<int64_t> padding,
                                            std::vector<int64_t> dilation) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const ConvParams conv = make_conv_params(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding,
                                           dilation, pattern.groups);
  const bool input_channels_last = is_channels_last(input);
  const bool grad_channels_last = is_channels_last_like(input, {conv.N, conv.K, conv.P, conv.Q});
  std::vector<int64_t> plans;
  const auto append = [&](Pass pass, bool channels_last) {
    const Plan plan = make_plan(pattern, conv, pass, input.scalar_type(), channels_last);
    plans.insert(plans.end(), {static_cast<int64_t>(plan.kernel), plan.macs});
  };
  append(Pass::forward, input_channels_last);
  append(Pass::grad_input, grad_channels_last);
  append(Pass::grad_weight, input_channels_last || grad_channels_last);
  return plans;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d", SPARSE_ADV_BOX(&masked_conv2d_cpu));
  m.impl("pack_values", SPARSE_ADV_BOX(&pack_values_cpu));
  m.impl("masked_conv2d_plan", SPARSE_ADV_BOX(&masked_conv2d_plan_cpu));
}

}  // namespace sparse_adv
