#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/convolution.h"
#include "cpu/dense_conv2d.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

Tensor masked_conv2d_cpu(Tensor input, Tensor weight, std::vector<Tensor> pattern_tensors, std::optional<Tensor> bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, std::optional<Tensor> scale, std::optional<Tensor> residual, bool relu) {
  const Pattern pattern = read_pattern(pattern_tensors);
  const Convolution conv = make_convolution(pattern, {input.sizes().begin(), input.sizes().end()}, stride, padding,
                                            dilation, groups);
  check_weight(pattern, weight, input);
  for (const auto& vector : {bias, scale})
    check(!vector || (vector->dim() == 1 && vector->size(0) == conv.K && vector->scalar_type() == input.scalar_type()),
          "bias and scale must hold one number per output channel, in the input's dtype");
  check(!residual || residual->scalar_type() == input.scalar_type(), "residual must have the input's dtype");
  check_size("residual", residual, {conv.N, conv.K, conv.P, conv.Q});
  return dense_conv2d(conv, pattern, input, weight, bias, scale, residual, relu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) { m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d_cpu)); }

}  // namespace sparse_adv
