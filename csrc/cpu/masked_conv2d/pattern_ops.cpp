// The ops on patterns: `pack_values`, and `masked_conv2d_plan`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/errors.h"
#include "common/layout.h"
#include "common/tensor_checks.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/packing.h"
#include "cpu/masked_conv2d/plan.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

std::vector<Tensor> pack_values_cpu(Tensor weight, std::vector<Tensor> pattern_tensors, std::optional<Tensor> scale) {
  const Pattern pattern = read_pattern(pattern_tensors);
  check_size("weight", weight,
             {pattern.out_channels, pattern.group_in_channels, pattern.filter_rows, pattern.filter_cols});
  check(weight.scalar_type() == torch::headeronly::ScalarType::Float, "weight must be float32 to be packed");
  check_size("scale", scale, {pattern.out_channels});
  check_dtype("scale", scale, "weight", weight);
  if (scale) scale = torch::stable::contiguous(*scale);
  const float* const factors = scale ? scale->const_data_ptr<float>() : nullptr;
  const auto packed = [&](const BlockCsr& csr, const WeightLayout& layout) {
    Tensor values = torch::stable::new_empty(weight, {csr.nnz * csr.oc_block});
    pack_values(csr, layout, factors, values.mutable_data_ptr<float>());
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
  m.impl("pack_values", SPARSE_ADV_BOX(&pack_values_cpu));
  m.impl("masked_conv2d_plan", SPARSE_ADV_BOX(&masked_conv2d_plan_cpu));
}

}  // namespace sparse_adv
