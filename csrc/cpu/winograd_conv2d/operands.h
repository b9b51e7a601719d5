// The operands that the ops of Winograd's filtering have in common, dense and masked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "cpu/winograd_conv2d/conv_kernel.h"

namespace sparse_adv {

// Throws unless the tensor is float32.
void check_float(const char* name, const torch::stable::Tensor& tensor);

// Throws unless the weight is float32 [K, C, 3, 3].
void check_filters_3x3(const torch::stable::Tensor& weight);

// The size of the result for these images; throws if they or the padding do not fit.
std::array<int64_t, 4> output_size(const torch::stable::Tensor& input, const std::vector<int64_t>& padding,
                                   int64_t channels);

// Where the weight has its filters; transposed, those of the convolution that gives the gradient of the input.
WinogradWeight weight_of(const torch::stable::Tensor& weight, bool transposed);

}  // namespace sparse_adv
