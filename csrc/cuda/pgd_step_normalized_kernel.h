// The linf step that also leaves the network's input, as one thread sees it: all channels of one pixel.
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
SPARSE_ADV_DEVICE void pgd_step_normalized_pixel(const NormalizedStep<Grad>& whole, int64_t pixel) {
  const PgdStep<float, Grad>& step = whole.step;
  const int64_t channel_step = whole.channels_last ? 1 : whole.area;
  const int64_t first = whole.channels_last ? pixel * whole.channels
                                            : pixel / whole.area * whole.channels * whole.area + pixel % whole.area;
  for (int64_t c = 0; c < whole.channels; ++c) {
    const int64_t at = first + c * channel_step;
    const float moved = moved_linf(step, step.adv[at], step.grad[at], step.clean[at]);
    step.out[at] = moved;
    whole.normalized[pixel * whole.channels + c] = (moved - whole.mean[c]) / whole.std[c];
  }
}

}  // namespace sparse_adv
