#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/convolution.h"
#include "cpu/dense_conv2d.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

Tensor masked_conv2d_grad_weight_cpu(Tensor grad_output, Tensor input, std::vector<Tensor> pattern_tensors,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const Convolution conv = make_convolution(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding,
                                            dilation, groups);
  check(grad_output.scalar_type() == input.scalar_type(), "grad_output must have the input's dtype");
  check_size("grad_output", grad_output, {conv.N, conv.K, conv.P, conv.Q});
  return dense_conv2d_grad_weight(conv, pattern, grad_output, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("masked_conv2d_grad_weight", TORCH_BOX(&masked_conv2d_grad_weight_cpu));
}

}  // namespace sparse_adv
