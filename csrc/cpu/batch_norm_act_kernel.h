// Sums over a batch for BatchNorm with the batch's statistics, and the gradient of its input.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/runs.h"

namespace sparse_adv {

// Tensors in one layout. With d = input + minus_shift[c]: the statistics are sums of d and of d * d, with a shift near
// the mean so that they do not cancel; the backward pass needs the sums of g and of g * d, with the mean as the
// shift, where g is grad after the gate of the ReLU.
template <class T>
struct BatchNormSums {
  Runs runs;
  const T* input;
  const T* minus_shift;     // [C]
  const T* grad = nullptr;  // null for the statistics
  const uint8_t* gate = nullptr;
};

// grad_input = scale[c] * g + slope[c] * d + offset[c], with d and g as above.
template <class T>
struct BatchNormGradInput {
  BatchNormSums<T> operands;
  const T *scale, *slope, *offset;  // [C]
  T* grad_input;
  T* grad_residual;  // receives g, or null
};

// Channels that are summed together: their accumulators stay in the L1 cache. Chosen, not tuned.
constexpr int64_t kChannelsTogether = 16;

// T is float or double.
//
// NCHW: channels `begin` to `end` - 1, at most kChannelsTogether, of all images. Writes first[c] and second[c].
SPARSE_ADV_FOR_EACH_ISA(template <class T> void batch_norm_channel_sums(const BatchNormSums<T>& operands,
                                                                        int64_t images, int64_t begin, int64_t end,
                                                                        double* first, double* second))

// channels_last: pixels `begin` to `end` - 1, all channels. Writes first[c] and second[c]; scratch has 2 C elements.
SPARSE_ADV_FOR_EACH_ISA(template <class T> void batch_norm_pixel_sums(const BatchNormSums<T>& operands, int64_t begin,
                                                                      int64_t end, T* scratch, double* first,
                                                                      double* second))

// The runs from `begin` to `end` - 1.
SPARSE_ADV_FOR_EACH_ISA(template <class T>
                        void batch_norm_grad_input(const BatchNormGradInput<T>& operands, int64_t begin, int64_t end))

}  // namespace sparse_adv
