#include <torch/csrc/stable/library.h>

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

Tensor sparse_conv2d_grad_input(const ConvParams& conv, const Pattern& pattern, const Blocking& blocking,
                                const Tensor& grad_output, const Tensor& weight, const EpilogueTensors& epilogue,
                                const std::optional<Tensor>& out) {
  const Tensor source = in_plain_layout(grad_output);
  Tensor grad_input = out ? *out : empty_in_layout_of(source, {conv.N, conv.C, conv.H, conv.W});
  run_sparse_conv({.csr = pattern.grad_input_csr(),
                   .weight = WeightLayout::grad_input(weight),
                   .blocking = blocking,
                   .source = source,
                   .epilogue = epilogue.pointers<float>(grad_input)},
                  grad_input);
  return grad_input;
}

// Returns the result in `out`, or in a new tensor without `out`.
Tensor grad_input(const Tensor& grad_output, const Tensor& weight, const std::vector<Tensor>& pattern_tensors,
                  const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                  const EpilogueTensors& epilogue, const std::optional<Tensor>& out) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const ConvParams conv = make_conv_params(pattern, input_size, stride, padding, dilation, groups);
  check_weight(pattern, weight, grad_output);
  check_size("grad_output", grad_output, {conv.N, conv.K, conv.P, conv.Q});
  if (out) {
    check_out(*out, {conv.N, conv.C, conv.H, conv.W}, "grad_output", grad_output, weight, epilogue);
    check_is_not_written(pattern, *out, epilogue);
  }
  const Plan plan =
      make_plan(pattern, conv, Pass::grad_input, grad_output.scalar_type(),
                is_channels_last(grad_output) || (out && is_channels_last(*out)), epilogue.gate_out || epilogue.gate);
  if (plan.kernel == Kernel::sparse)
    return sparse_conv2d_grad_input(conv, pattern, *plan.blocking, grad_output, weight, epilogue, out);
  return dense_conv2d_grad_input(conv, pattern, grad_output, weight, epilogue, out);
}

Tensor masked_conv2d_grad_input_cpu(Tensor grad_output, Tensor weight, std::vector<Tensor> pattern,
                                    std::vector<int64_t> input_size, std::vector<int64_t> stride,
                                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  return grad_input(grad_output, weight, pattern, input_size, stride, padding, dilation, groups, {}, std::nullopt);
}

void masked_conv2d_grad_input_out_cpu(Tensor grad_output, Tensor weight, std::vector<Tensor> pattern,
                                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                                      std::vector<int64_t> dilation, int64_t groups, std::optional<Tensor> residual,
                                      std::optional<Tensor> gate, Tensor out) {
  grad_input(grad_output, weight, pattern, {out.sizes().begin(), out.sizes().end()}, stride, padding, dilation, groups,
             {.residual = residual, .gate = gate}, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d_grad_input", SPARSE_ADV_BOX(&masked_conv2d_grad_input_cpu));
  m.impl("masked_conv2d_grad_input_out", SPARSE_ADV_BOX(&masked_conv2d_grad_input_out_cpu));
}

}  // namespace sparse_adv
