#include "common/tensor_checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <utility>

#include "common/errors.h"

namespace sparse_adv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::ostream& operator<<(std::ostream& out, const SizesText& text) {
  out << "[";
  for (size_t i = 0; i < text.sizes.size(); ++i) out << (i > 0 ? ", " : "") << text.sizes[i];
  return out << "]";
}

void check_floating(const char* name, const Tensor& tensor, const Tensor& first) {
  check(tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(), name,
        " must be on the device of the images");
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        name, " must be float64, float32, bfloat16 or float16, got ", dtype);
}

void check_size(const char* name, const std::optional<Tensor>& tensor, const std::vector<int64_t>& size) {
  if (!tensor) return;
  check(tensor->is_cpu(), name, " must be on the CPU");
  check(std::ranges::equal(size, tensor->sizes()), name, " must have size ", text_of(size), ", got ",
        text_of(tensor->sizes()));
}

void check_dtype(const char* name, const std::optional<Tensor>& tensor, const char* like_name, const Tensor& like) {
  if (!tensor) return;
  check(tensor->scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name, ", ",
        like.scalar_type(), ", got ", tensor->scalar_type());
}

void check_memory(const char* name, const std::optional<Tensor>& written, const char* other_name,
                  const std::optional<Tensor>& other, bool may_be_same) {
  if (!written || !other) return;
  if (written->numel() == 0 || other->numel() == 0) return;
  const auto range = [](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
    return std::pair{begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
  };
  const auto of_written = range(*written), of_other = range(*other);
  if (may_be_same && of_written == of_other) return;
  check(of_written.second <= of_other.first || of_other.second <= of_written.first, name, " shares memory with ",
        other_name);
}

}  // namespace sparse_adv
