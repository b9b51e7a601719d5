// What a pass is going to do, decided once per call: the kernel, how that divides its work, and what it costs.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/pattern.h"

namespace sparse_adv {

enum class Pass { forward, grad_input, grad_weight };

struct Plan {
  Kernel kernel;                 // sparse or dense, never automatic
  int64_t macs;                  // multiply-adds: those of the kept weights for sparse, of all weights for dense
  std::optional<Window> window;  // the geometry that the sparse kernel runs with; empty for dense
};

// `channels_last`: the layout of the images that the pass reads. The kernel is the one that the pattern's header
// requests, or the one that a static table expects to be faster; dense wherever the sparse kernel cannot run.
Plan make_plan(const Pattern& pattern, const Convolution& conv, Pass pass, torch::headeronly::ScalarType dtype,
               bool channels_last);

}  // namespace sparse_adv
