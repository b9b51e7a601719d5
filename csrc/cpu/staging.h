// Converts between the tensors that users pass and the dense float32 or float64 memory that elementwise kernels need.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace sparse_adv {

bool is_double(const torch::stable::Tensor& tensor);

// The tensor that a kernel writes its result to: `output` itself if the kernel supports its layout and dtype, else a
// tensor in its layout, or a contiguous one if that is not supported. 16-bit images are computed in float32 and rounded
// once, at the end.
torch::stable::Tensor staging_for(const torch::stable::Tensor& output, bool layout_is_supported);

// The tensor itself if it has the dtype and the strides of `staging`, else a copy that has them.
torch::stable::Tensor staged(const torch::stable::Tensor& tensor, const torch::stable::Tensor& staging);

// Copies `staging` to `output`, unless they are one tensor.
void unstage(const torch::stable::Tensor& staging, torch::stable::Tensor& output);

}  // namespace sparse_adv
