// The sizes of one convolution. Letters, here and in the kernels: N batch, C input channels, H x W image; K output
// channels, R x S filter; P x Q output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "cpu/masked_conv2d/pattern.h"

namespace sparse_adv {

struct ConvParams {
  int64_t N, C, H, W, K, R, S, P, Q;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;

  int64_t weights() const { return K * (C / groups) * R * S; }

  bool is_dilated() const { return dilation[0] > 1 || dilation[1] > 1; }
  // Of all pairs of an output pixel and a tap, the share that reads a pixel of the image, and not the padding.
  double share_inside() const;
  // Whether each output pixel reads a pixel of the image, and not the padding alone.
  bool every_window_reads() const;
};

// Throws where the sizes do not fit together or to the pattern, or 64 bits cannot count the multiply-adds.
ConvParams make_conv_params(const Pattern& pattern, const std::vector<int64_t>& input_size,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups);

// Throws where the weight does not have the pattern's shape or the dtype of `images`.
void check_weight(const Pattern& pattern, const torch::stable::Tensor& weight, const torch::stable::Tensor& images);

}  // namespace sparse_adv
