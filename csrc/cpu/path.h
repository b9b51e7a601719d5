// Which kernel a pass takes: what the pattern's header says, or a static table.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "cpu/convolution.h"
#include "cpu/pattern.h"

namespace sparse_adv {

enum class Pass { forward, grad_input, grad_weight };

// Path::sparse or Path::dense.
Path choose_path(const Pattern& pattern, const Convolution& conv, Pass pass, torch::headeronly::ScalarType dtype,
                 bool channels_last);

}  // namespace sparse_adv
