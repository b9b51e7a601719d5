// Where tensors keep their elements. The layout rule of every op: a channels_last tensor gives channels_last, anything
// else NCHW.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>

namespace sparse_adv {

bool is_channels_last(const torch::stable::Tensor& tensor);

// Whether a tensor of this size, made in the layout of `like`, is channels_last: with one channel or one pixel it would
// be NCHW too, and counts as that.
bool is_channels_last_like(const torch::stable::Tensor& like, const std::array<int64_t, 4>& size);

// Whether it is NCHW or channels_last without gaps: then each image of a batch lies in one piece.
bool has_plain_layout(const torch::stable::Tensor& tensor);

// A tensor of this size in the layout of `like`, uninitialised.
torch::stable::Tensor empty_in_layout_of(const torch::stable::Tensor& like, const std::array<int64_t, 4>& size);

// The tensor, copied where needed, in the layout of `like`.
torch::stable::Tensor in_layout_of(const torch::stable::Tensor& like, const torch::stable::Tensor& tensor);

// The tensor itself if it has a plain layout, else a copy that has.
torch::stable::Tensor in_plain_layout(const torch::stable::Tensor& tensor);

// Whether two tensors of one size keep each element at the same place.
bool lie_alike(const torch::stable::Tensor& tensor, const torch::stable::Tensor& other);

}  // namespace sparse_adv
