// The ops `max_pool2d_out` and `max_pool2d_grad_input_out`; the stride is the size of a window.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/tensor_checks.h"
#include "cpu/epilogue_tensors.h"
#include "cpu/max_pool2d_kernel.h"
#include "cpu/pointwise_kernel.h"
#include "cpu/staging.h"

namespace sparse_adv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// `image` and `pooled` are in one layout. Lines of the image are rows of one channel (NCHW) or of all (channels_last,
// and images of one pixel).
struct Geometry {
  int64_t planes;  // images, times channels if NCHW
  int64_t image_rows, pooled_rows;
  int64_t image_line, pooled_line;  // elements
  PoolRow row;
};

Geometry check_geometry(const Tensor& image, const Tensor& pooled, const std::vector<int64_t>& kernel_size,
                        const std::optional<Tensor>& index) {
  check(image.dim() == 4, "the images must have 4 dimensions, got ", image.dim());
  check(image.scalar_type() == ScalarType::Float || image.scalar_type() == ScalarType::Double,
        "the images must be float32 or float64, got ", image.scalar_type());
  check(has_plain_layout(image), "the images must be NCHW or channels_last without gaps, got strides ",
        text_of(image.strides()));
  check(kernel_size.size() == 2 && kernel_size[0] >= 1 && kernel_size[1] >= 1 && kernel_size[0] <= 255 &&
            kernel_size[1] <= 255 / kernel_size[0],
        "kernel_size must be rows and columns of a window of 1 to 255 elements");
  const int64_t N = image.size(0), C = image.size(1), H = image.size(2), W = image.size(3);
  const std::vector<int64_t> pooled_size{N, C, H / kernel_size[0], W / kernel_size[1]};
  check_size("the pooled images", pooled, pooled_size);
  check_dtype("the pooled images", pooled, "the images", image);
  const bool fits = is_channels_last(image) ? layouts_agree(pooled, image) : pooled.is_contiguous();
  check(fits, "the pooled images must have the layout of the images, got strides ", text_of(pooled.strides()));
  check_size("index", index, pooled_size);
  if (index)
    check(index->scalar_type() == ScalarType::Byte && have_same_layout(*index, pooled),
          "index must be uint8 and have the layout of the pooled images, got ", index->scalar_type(), " with strides ",
          text_of(index->strides()));
  const bool channels_last = runs_of(image, false).channels_last;
  const int64_t step = channels_last ? C : 1;
  return {.planes = channels_last ? N : N * C,
          .image_rows = H,
          .pooled_rows = H / kernel_size[0],
          .image_line = W * step,
          .pooled_line = W / kernel_size[1] * step,
          .row = {.windows = W / kernel_size[1],
                  .rows = kernel_size[0],
                  .cols = kernel_size[1],
                  .row_pitch = W * step,
                  .step = step}};
}

// Calls body(plane) for all planes on several threads.
template <class Body>
void for_each_plane(const Geometry& geometry, const Body& body) {
  const int64_t elements = std::max<int64_t>(1, geometry.image_rows * geometry.image_line);
  parallel_for(0, geometry.planes, std::max<int64_t>(1, kElementwiseGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) body(plane);
  });
}

template <class T>
void forward(const Geometry& geometry, const Tensor& input, const Tensor& out, const std::optional<Tensor>& index) {
  const auto kernel = SPARSE_ADV_CHOOSE(max_pool2d_row<T>);
  const T* const from = input.const_data_ptr<T>();
  T* const to = out.mutable_data_ptr<T>();
  uint8_t* const numbers = index ? index->mutable_data_ptr<uint8_t>() : nullptr;
  for_each_plane(geometry, [&](int64_t plane) {
    for (int64_t p = 0; p < geometry.pooled_rows; ++p) {
      const int64_t line = plane * geometry.image_rows + p * geometry.row.rows;
      const int64_t at = (plane * geometry.pooled_rows + p) * geometry.pooled_line;
      kernel(geometry.row, from + line * geometry.image_line, to + at, numbers ? numbers + at : nullptr);
    }
  });
}

// The gate is applied to a plane while it is in the cache.
template <class T>
void backward(const Geometry& geometry, const Tensor& grad_output, const Tensor& index, const Tensor& out,
              const EpilogueTensors& epilogue) {
  const auto kernel = SPARSE_ADV_CHOOSE(max_pool2d_grad_row<T>);
  const auto apply_gate = SPARSE_ADV_CHOOSE(pointwise<T>);
  const T* const from = grad_output.const_data_ptr<T>();
  const uint8_t* const numbers = index.const_data_ptr<uint8_t>();
  T* const to = out.mutable_data_ptr<T>();
  Pointwise<T> operands{
      .input = to, .out = to, .epilogue = epilogue.pointers<T>(out), .runs = runs_of(out, epilogue.gate.has_value())};
  const T* const residual = std::exchange(operands.epilogue.residual, nullptr);
  const int64_t plane_size = geometry.image_rows * geometry.image_line, runs = plane_size / operands.runs.size();
  const int64_t line = geometry.image_line,
                covered = geometry.pooled_line * geometry.row.cols;  // elements of a line that windows cover
  const auto fill = [&](int64_t begin, int64_t end) {                // elements that no window covers
    if (!residual) std::fill(to + begin, to + end, T(0));
    if (residual && residual != to) std::copy(residual + begin, residual + end, to + begin);
  };
  for_each_plane(geometry, [&](int64_t plane) {
    const int64_t start = plane * plane_size, rows = geometry.pooled_rows * geometry.row.rows;
    for (int64_t p = 0; p < geometry.pooled_rows; ++p) {
      const int64_t at = (plane * geometry.pooled_rows + p) * geometry.pooled_line;
      const int64_t first = start + p * geometry.row.rows * line;
      kernel(geometry.row, from + at, numbers + at, residual ? residual + first : nullptr, to + first);
    }
    if (covered < line)
      for (int64_t row = 0; row < rows; ++row) fill(start + row * line + covered, start + (row + 1) * line);
    fill(start + rows * line, start + plane_size);
    if (epilogue.gate) apply_gate(operands, plane * runs, (plane + 1) * runs);
  });
}

void max_pool2d_out_cpu(Tensor input, std::vector<int64_t> kernel_size, Tensor out, std::optional<Tensor> index) {
  const Geometry geometry = check_geometry(input, out, kernel_size, index);
  check_memory("out", out, "input", input);
  check_memory("index", index, "input", input);
  check_memory("index", index, "out", out);
  if (out.numel() == 0) return;
  (is_double(out) ? &forward<double> : &forward<float>)(geometry, input, out, index);
}

void max_pool2d_grad_input_out_cpu(Tensor grad_output, Tensor index, std::vector<int64_t> kernel_size,
                                   std::optional<Tensor> residual, std::optional<Tensor> gate, Tensor out) {
  const Geometry geometry = check_geometry(out, grad_output, kernel_size, index);
  check_memory("out", out, "grad_output", grad_output);
  check_memory("out", out, "index", index);
  check_residual(residual, out);
  check_gate("gate", gate, out);
  if (out.numel() == 0) return;
  const EpilogueTensors epilogue{.residual = residual, .gate = gate};
  (is_double(out) ? &backward<double> : &backward<float>)(geometry, grad_output, index, out, epilogue);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("max_pool2d_out", SPARSE_ADV_BOX(&max_pool2d_out_cpu));
  m.impl("max_pool2d_grad_input_out", SPARSE_ADV_BOX(&max_pool2d_grad_input_out_cpu));
}

}  // namespace sparse_adv
