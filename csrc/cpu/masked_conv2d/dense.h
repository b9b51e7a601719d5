// The dense kernel: PyTorch's convolution and its gradients on the masked weight. It runs for float64 and 16-bit
// tensors, and for all layers for which the sparse kernel would be slower.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/masked_conv2d/conv_params.h"

namespace sparse_adv {

torch::stable::Tensor dense_conv2d(const ConvParams& conv, const Pattern& pattern, const torch::stable::Tensor& input,
                                   const torch::stable::Tensor& weight,
                                   const std::optional<torch::stable::Tensor>& bias,
                                   const std::optional<torch::stable::Tensor>& scale,
                                   const std::optional<torch::stable::Tensor>& residual, bool relu);

torch::stable::Tensor dense_conv2d_grad_input(const ConvParams& conv, const Pattern& pattern,
                                              const torch::stable::Tensor& grad_output,
                                              const torch::stable::Tensor& weight);

torch::stable::Tensor dense_conv2d_grad_weight(const ConvParams& conv, const Pattern& pattern,
                                               const torch::stable::Tensor& grad_output,
                                               const torch::stable::Tensor& input);

}  // namespace sparse_adv
