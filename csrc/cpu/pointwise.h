// The epilogue on its own: the op `pointwise_out`, and the end of the dense convolution.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/epilogue_tensors.h"

namespace sparse_adv {

// out = act(scale[c] * input + bias[c] + residual). The input has the layout and the dtype of out, and may be out.
void pointwise_into(torch::stable::Tensor& out, const torch::stable::Tensor& input, const EpilogueTensors& epilogue);

}  // namespace sparse_adv
