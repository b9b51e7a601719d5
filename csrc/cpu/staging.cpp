#include "cpu/staging.h"

#include <torch/csrc/stable/ops.h>

#include "common/layout.h"

namespace sparse_adv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

Tensor staging_for(const Tensor& output, bool layout_is_supported) {
  const ScalarType dtype = is_double(output) ? ScalarType::Double : ScalarType::Float;
  if (layout_is_supported && output.scalar_type() == dtype) return output;
  const bool channels_last = layout_is_supported && is_channels_last(output);
  return torch::stable::empty(output.sizes(), dtype, std::nullopt, output.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor staged(const Tensor& tensor, const Tensor& staging) {
  if (tensor.scalar_type() == staging.scalar_type() && have_same_layout(tensor, staging)) return tensor;
  Tensor copy = torch::stable::empty_like(staging);
  return torch::stable::copy_(copy, tensor);
}

void unstage(const Tensor& staging, Tensor& output) {
  if (staging.get() != output.get()) torch::stable::copy_(output, staging);
}

}  // namespace sparse_adv
