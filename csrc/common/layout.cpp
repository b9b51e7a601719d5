#include "common/layout.h"

#include <torch/csrc/stable/ops.h>

namespace sparse_adv {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

static bool has_channels_last_strides(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const int64_t C = tensor.size(1), H = tensor.size(2), W = tensor.size(3);
  return (C == 1 || tensor.stride(1) == 1) && (W == 1 || tensor.stride(3) == C) &&
         (H == 1 || tensor.stride(2) == C * W) && (tensor.size(0) == 1 || tensor.stride(0) == C * W * H);
}

bool is_channels_last(const Tensor& tensor) { return !tensor.is_contiguous() && has_channels_last_strides(tensor); }

bool is_channels_last_like(const Tensor& like, const std::array<int64_t, 4>& size) {
  return is_channels_last(like) && size[1] != 1 && (size[2] != 1 || size[3] != 1);
}

bool has_plain_layout(const Tensor& tensor) { return tensor.is_contiguous() || is_channels_last(tensor); }

Tensor empty_in_layout_of(const Tensor& like, const std::array<int64_t, 4>& size) {
  return torch::stable::empty({size.data(), size.size()}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor in_layout_of(const Tensor& like, const Tensor& tensor) {
  return torch::stable::contiguous(tensor,
                                   is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor in_plain_layout(const Tensor& tensor) {
  return has_plain_layout(tensor) ? tensor : torch::stable::contiguous(tensor);
}

bool layouts_agree(const Tensor& tensor, const Tensor& other) {
  return (tensor.is_contiguous() && other.is_contiguous()) ||
         (has_channels_last_strides(tensor) && has_channels_last_strides(other));
}

bool have_same_layout(const Tensor& tensor, const Tensor& other) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (tensor.size(dim) != 1 && tensor.stride(dim) != other.stride(dim)) return false;
  return true;
}

}  // namespace sparse_adv
