// The dense kernel: PyTorch's convolution and its gradients on the masked weight. It runs for float64 and 16-bit
// tensors, and for all layers for which the sparse kernel would be slower.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/epilogue_tensors.h"
#include "cpu/masked_conv2d/conv_params.h"

namespace sparse_adv {

// Forward and grad_input return their result in `out`, or in a new tensor without `out`.
torch::stable::Tensor dense_conv2d(const ConvParams& conv, const Pattern& pattern, const torch::stable::Tensor& input,
                                   const torch::stable::Tensor& weight, const EpilogueTensors& epilogue,
                                   const std::optional<torch::stable::Tensor>& out);

torch::stable::Tensor dense_conv2d_grad_input(const ConvParams& conv, const Pattern& pattern,
                                              const torch::stable::Tensor& grad_output,
                                              const torch::stable::Tensor& weight, const EpilogueTensors& epilogue,
                                              const std::optional<torch::stable::Tensor>& out);

torch::stable::Tensor dense_conv2d_grad_weight(const ConvParams& conv, const Pattern& pattern,
                                               const torch::stable::Tensor& grad_output,
                                               const torch::stable::Tensor& input);

}  // namespace sparse_adv
