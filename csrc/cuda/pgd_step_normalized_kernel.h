// The linf step that also writes the normalised input of the network. One thread computes all channels of one pixel.
#pragma once

#include "cuda/pgd_step_kernel.h"

namespace sparse_adv {

template <class Grad>
struct NormalizedStep {
  PgdStep<float, Grad> step;
  const float* mean;
  const float* std;
  torch::headeronly::BFloat16* normalized;  // channels_last
  int64_t channels, area;
  bool channels_last;  // of the images
};

template <class Grad>
SPARSE_ADV_DEVICE void pgd_step_normalized_pixel(const NormalizedStep<Grad>& normalized_step, int64_t pixel) {
  const PgdStep<float, Grad>& step = normalized_step.step;
  const int64_t channel_step = normalized_step.channels_last ? 1 : normalized_step.area;
  const int64_t first = normalized_step.channels_last
                            ? pixel * normalized_step.channels
                            : pixel / normalized_step.area * normalized_step.channels * normalized_step.area +
                                  pixel % normalized_step.area;
  for (int64_t c = 0; c < normalized_step.channels; ++c) {
    const int64_t at = first + c * channel_step;
    const float moved = moved_linf(step, step.adv[at], step.grad[at], step.clean[at]);
    step.out[at] = moved;
    normalized_step.normalized[pixel * normalized_step.channels + c] =
        (moved - normalized_step.mean[c]) / normalized_step.std[c];
  }
}

}  // namespace sparse_adv
