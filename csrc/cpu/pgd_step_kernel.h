// The PGD step on dense memory. adv, grad, clean and out have the same layout; out may be adv.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

struct StepSizes {
  double alpha, eps, lo, hi;
};

// On `count` elements; T is float or double.
SPARSE_ADV_FOR_EACH_ISA(template <class T> void pgd_step_linf(const T* adv, const T* grad, const T* clean, T* out,
                                                              int64_t count, const StepSizes& sizes))

// On each of `samples` images of `count` elements.
SPARSE_ADV_FOR_EACH_ISA(template <class T> void pgd_step_l2(const T* adv, const T* grad, const T* clean, T* out,
                                                            int64_t samples, int64_t count, const StepSizes& sizes))

}  // namespace sparse_adv
