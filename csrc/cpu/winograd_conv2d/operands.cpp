#include "cpu/winograd_conv2d/operands.h"

#include "common/errors.h"
#include "common/tensor_checks.h"

namespace sparse_adv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_float(const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got ", tensor.scalar_type());
}

void check_filters_3x3(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "weight must be [K, C, 3, 3], got ",
        text_of(weight.sizes()));
  check_float("weight", weight);
}

std::array<int64_t, 4> output_size(const Tensor& input, const std::vector<int64_t>& padding, int64_t channels) {
  check(padding.size() == 2, "padding must have 2 elements, got ", padding.size());
  for (const int64_t zeros : padding) check(zeros >= 0 && zeros <= 2, "padding must be 0, 1 or 2, got ", zeros);
  check(input.size(0) == 0 || (input.size(2) > 0 && input.size(3) > 0), "input must have pixels, got ",
        text_of(input.sizes()));
  const int64_t P = input.size(2) + 2 * padding[0] - 2, Q = input.size(3) + 2 * padding[1] - 2;
  check(P >= 1 && Q >= 1, "input must have a window of 3 x 3 pixels, got ", text_of(input.sizes()));
  return {input.size(0), channels, P, Q};
}

WinogradWeight weight_of(const Tensor& weight, bool transposed) {
  const int64_t out = weight.stride(0), in = weight.stride(1), rows = weight.stride(2), cols = weight.stride(3);
  const float* const first = weight.const_data_ptr<float>();
  if (transposed)
    return {.first = first + 2 * rows + 2 * cols,
            .out_stride = in,
            .in_stride = out,
            .row_stride = -rows,
            .col_stride = -cols,
            .out_channels = weight.size(1),
            .in_channels = weight.size(0)};
  return {.first = first,
          .out_stride = out,
          .in_stride = in,
          .row_stride = rows,
          .col_stride = cols,
          .out_channels = weight.size(0),
          .in_channels = weight.size(1)};
}

}  // namespace sparse_adv
