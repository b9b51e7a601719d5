// The epilogue of a convolution on its own: out = act(scale[c] * input + bias[c] + residual) on dense memory.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/epilogue.h"
#include "cpu/runs.h"

namespace sparse_adv {

template <class T>
struct Pointwise {
  const T* input;
  T* out;  // may be input
  Epilogue<T> epilogue;
  Runs runs;
};

// The runs from `begin` to `end` - 1; T is float or double.
SPARSE_ADV_FOR_EACH_ISA(template <class T> void pointwise(const Pointwise<T>& operands, int64_t begin, int64_t end))

}  // namespace sparse_adv
