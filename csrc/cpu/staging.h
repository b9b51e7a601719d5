// Between the tensors that users have and the dense float32 or float64 memory that elementwise kernels work on.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace sparse_adv {

bool is_double(const torch::stable::Tensor& tensor);

// Where a kernel writes what belongs into `output`: `output` itself if its layout suits the kernel, else contiguous
// memory. 16-bit images are computed in float32 and rounded once, at the end.
torch::stable::Tensor staging_for(const torch::stable::Tensor& output, bool layout_fits);

// The tensor itself if it has the dtype and the strides of `staging`, else a copy that does.
torch::stable::Tensor staged(const torch::stable::Tensor& tensor, const torch::stable::Tensor& staging);

// Brings the result home, where it is not there yet.
void unstage(const torch::stable::Tensor& staging, torch::stable::Tensor& output);

}  // namespace sparse_adv
