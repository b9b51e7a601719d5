// Fills the tiles of scratch memory that the kernels read: a strip of the images, its padding included, and the same
// strip of grad_output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/masked_conv2d/batch_layout_kernel.h"
#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/width_layout_kernel.h"

namespace sparse_adv {

// The images of an item of the window's work, from a tensor in a plain layout.
Images images_of(const torch::stable::Tensor& tensor, const Window& window, int64_t item);

// The buffers that a thread fills for a strip; they keep their memory from call to call.
struct StripPlacement {
  std::vector<int32_t> place, gaps;
  Placement samples(const Window& window, int64_t strip);
};

// Fills a strip's window from its images.
class Filler {
 public:
  // `buffers` hold what it points to.
  Filler(const Window& window, StripPlacement& buffers, int64_t strip, const Images& images);
  // The block of channels from `first_channel` on.
  void fill(int64_t first_channel, float* to) const;

 private:
  const Window& window_;
  Images images_;
  Placement samples_;
  RowPlacement pixels_;
};

// Fills strips of grad_output: the tiles of the input's window, without padding.
class GradFiller {
 public:
  explicit GradFiller(const Window& window) : plane(window.strip * window.across), window_(window) {}

  void fill(const Images& grads, int64_t strip, float* to);

  const int64_t plane;  // vectors from one channel to the next

 private:
  RowPlacement pixels(int64_t strip) const;
  Placement samples(int64_t strip);

  const Window& window_;
  std::vector<int32_t> place_, gaps_;
};

}  // namespace sparse_adv
