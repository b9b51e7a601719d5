// Argument checks of pgd_step, pgd_step_normalized and random_start, for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/errors.h"
#include "common/tensor_checks.h"

namespace sparse_adv {

// The tensors of a PGD step: three batches of one size, each of any floating dtype. Whether `adv`, where it is written,
// shares a part of its memory with another is checked in ops/pgd_step.py: that would spoil values, but no memory.
inline void check_step(const torch::stable::Tensor& adv, const torch::stable::Tensor& grad,
                       const torch::stable::Tensor& clean) {
  check_floating("adv", adv, adv);
  check_floating("grad", grad, adv);
  check_floating("clean", clean, adv);
  check(std::ranges::equal(grad.sizes(), adv.sizes()), "grad must have the sizes of adv");
  check(std::ranges::equal(clean.sizes(), adv.sizes()), "clean must have the sizes of adv");
}

// The seed of a random start: Philox key and offset, on the device of the images.
inline void check_start(const torch::stable::Tensor& clean, const torch::stable::Tensor& seed) {
  check_floating("clean", clean, clean);
  check(seed.is_cpu() == clean.is_cpu() && seed.get_device_index() == clean.get_device_index() && seed.dim() == 1 &&
            seed.size(0) == 2 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
        "seed must be an int64 tensor of size [2] on the device of the images");
}

}  // namespace sparse_adv
