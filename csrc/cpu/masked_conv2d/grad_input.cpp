#include <torch/csrc/stable/library.h>

#include "common/errors.h"
#include "common/layout.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/dense.h"
#include "cpu/masked_conv2d/plan.h"
#include "cpu/masked_conv2d/sparse.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

Tensor sparse_conv2d_grad_input(const ConvParams& conv, const Pattern& pattern, const Blocking& blocking,
                                const Tensor& grad_output, const Tensor& weight) {
  const Tensor source = in_plain_layout(grad_output);
  Tensor grad_input = empty_in_layout_of(source, {conv.N, conv.C, conv.H, conv.W});
  run_sparse_conv({.csr = pattern.grad_input_csr(),
                   .weight = WeightLayout::grad_input(weight),
                   .blocking = blocking,
                   .source = source,
                   .epilogue = {}},
                  grad_input);
  return grad_input;
}

Tensor masked_conv2d_grad_input_cpu(Tensor grad_output, Tensor weight, std::vector<Tensor> pattern_tensors,
                                    std::vector<int64_t> input_size, std::vector<int64_t> stride,
                                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const ConvParams conv = make_conv_params(pattern, input_size, stride, padding, dilation, groups);
  check_weight(pattern, weight, grad_output);
  check_size("grad_output", grad_output, {conv.N, conv.K, conv.P, conv.Q});
  const Plan plan =
      make_plan(pattern, conv, Pass::grad_input, grad_output.scalar_type(), is_channels_last(grad_output));
  if (plan.kernel == Kernel::sparse)
    return sparse_conv2d_grad_input(conv, pattern, *plan.blocking, grad_output, weight);
  return dense_conv2d_grad_input(conv, pattern, grad_output, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d_grad_input", SPARSE_ADV_BOX(&masked_conv2d_grad_input_cpu));
}

}  // namespace sparse_adv
