// The sizes of one convolution. Letters, here and in the kernels: N batch, C input channels, H x W image; K output
// channels, R x S filter; P x Q output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "cpu/pattern.h"

namespace sparse_adv {

struct Convolution {
  int64_t N, C, H, W, K, R, S, P, Q;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

// Throws where the sizes do not fit together or to the pattern.
Convolution make_convolution(const Pattern& pattern, const std::vector<int64_t>& input_size,
                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups);

// Throws where the weight is not the pattern's or its dtype is not that of `images`.
void check_weight(const Pattern& pattern, const torch::stable::Tensor& weight, const torch::stable::Tensor& images);

void check_size(const char* name, const std::optional<torch::stable::Tensor>& tensor,
                const std::array<int64_t, 4>& size);

// The layout rule of every op: a channels_last tensor gives channels_last, anything else NCHW.
bool is_channels_last(const torch::stable::Tensor& tensor);

// A tensor of this size in the layout of `like`, uninitialised.
torch::stable::Tensor empty_in_layout_of(const torch::stable::Tensor& like, const std::array<int64_t, 4>& size);

// The tensor, copied where needed, in the layout of `like`.
torch::stable::Tensor in_layout_of(const torch::stable::Tensor& like, const torch::stable::Tensor& tensor);

// The tensor itself if it is NCHW or channels_last without gaps, else a copy that is.
torch::stable::Tensor in_plain_layout(const torch::stable::Tensor& tensor);

}  // namespace sparse_adv
