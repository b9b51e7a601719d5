// The plan of a pass, made once per call: the kernel, its blocking, and the multiply-adds that it executes.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/pattern.h"

namespace sparse_adv {

enum class Pass { forward, grad_input, grad_weight };

struct Plan {
  Kernel kernel;                     // sparse or dense, never automatic
  int64_t macs;                      // multiply-adds: of the weights kept by the mask for sparse, of all for dense
  std::optional<Blocking> blocking;  // of the sparse kernel; empty for dense
};

// `channels_last`: the layout of the images that the pass reads. `gated`: whether the epilogue reads or writes a gate,
// on which the blocking depends, but not the kernel: what holds for the plan without a gate holds with one. The kernel
// is the one that the pattern's header requests, or the one that a cost model expects to be faster; dense wherever the
// sparse kernel cannot run.
Plan make_plan(const Pattern& pattern, const ConvParams& conv, Pass pass, torch::headeronly::ScalarType dtype,
               bool channels_last, bool gated = false);

}  // namespace sparse_adv
