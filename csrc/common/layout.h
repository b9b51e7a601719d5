// Memory layouts of tensors. Rule of every op: the output of a channels_last input is channels_last, that of any other
// input is NCHW.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>

namespace sparse_adv {

bool is_channels_last(const torch::stable::Tensor& tensor);

// Whether a tensor of this size in the layout of `like` is channels_last. With one channel or one pixel both layouts
// are the same, and it counts as NCHW.
bool is_channels_last_like(const torch::stable::Tensor& like, const std::array<int64_t, 4>& size);

// Whether it is NCHW or channels_last without gaps: then each image of a batch is one contiguous piece of memory.
bool has_plain_layout(const torch::stable::Tensor& tensor);

// A tensor of this size in the layout of `like`, uninitialised.
torch::stable::Tensor empty_in_layout_of(const torch::stable::Tensor& like, const std::array<int64_t, 4>& size);

// The tensor in the layout of `like`: itself, or a copy.
torch::stable::Tensor in_layout_of(const torch::stable::Tensor& like, const torch::stable::Tensor& tensor);

// The tensor itself if it has a plain layout, else a contiguous copy.
torch::stable::Tensor in_plain_layout(const torch::stable::Tensor& tensor);

// Whether both are NCHW or both are channels_last, without gaps. A tensor with one channel or one pixel is both.
bool layouts_agree(const torch::stable::Tensor& tensor, const torch::stable::Tensor& other);

// Whether two tensors of one size have the same strides, apart from dimensions of size 1.
bool have_same_layout(const torch::stable::Tensor& tensor, const torch::stable::Tensor& other);

}  // namespace sparse_adv
