#include "cpu/staging.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"

namespace sparse_adv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_floating(const char* name, const Tensor& tensor) {
  check(tensor.is_cpu(), name, " must be on the CPU");
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        name, " must be float64, float32, bfloat16 or float16");
}

void check_same_sizes(const char* name, const Tensor& tensor, const Tensor& images) {
  check(std::ranges::equal(tensor.sizes(), images.sizes()), name, " must have the sizes of the images");
}

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

Tensor staging_for(const Tensor& output, bool layout_fits) {
  const ScalarType dtype = is_double(output) ? ScalarType::Double : ScalarType::Float;
  if (layout_fits && output.scalar_type() == dtype) return output;
  return torch::stable::empty(output.sizes(), dtype, std::nullopt, output.device());
}

Tensor staged(const Tensor& tensor, const Tensor& staging) {
  bool same = tensor.scalar_type() == staging.scalar_type();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    same = same && (tensor.size(dim) == 1 || tensor.stride(dim) == staging.stride(dim));
  if (same) return tensor;
  Tensor copy = torch::stable::empty_like(staging);
  return torch::stable::copy_(copy, tensor);
}

void unstage(const Tensor& staging, Tensor& output) {
  if (staging.get() != output.get()) torch::stable::copy_(output, staging);
}

}  // namespace sparse_adv
