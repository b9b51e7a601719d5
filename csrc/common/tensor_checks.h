// Checks of the tensors that several ops take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <ostream>
#include <vector>

namespace sparse_adv {

// Sizes or strides that are written as text such as "[2, 3]". The text is formed where it is written: a check that
// holds needs none (16 texts took a third of the time of a convolution of one small image).
struct SizesText {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};
inline SizesText text_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) { return {sizes}; }
std::ostream& operator<<(std::ostream& out, const SizesText& text);

// Throws unless the tensor is on the device of `first` and is float64, float32, bfloat16 or float16.
void check_floating(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& first);

// Throws unless the tensor is on the CPU and has this size.
void check_size(const char* name, const std::optional<torch::stable::Tensor>& tensor, const std::vector<int64_t>& size);

// Throws unless the tensor has the dtype of `like`.
void check_dtype(const char* name, const std::optional<torch::stable::Tensor>& tensor, const char* like_name,
                 const torch::stable::Tensor& like);

// Throws if a tensor that is written lies between the first and the last element of another one, or the other way
// round. If `may_be_same`, the two may have exactly the same memory.
void check_memory(const char* name, const std::optional<torch::stable::Tensor>& written, const char* other_name,
                  const std::optional<torch::stable::Tensor>& other, bool may_be_same = false);

}  // namespace sparse_adv
