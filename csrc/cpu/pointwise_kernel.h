// The epilogue of a convolution on its own: out = act(scale[c] * input + bias[c] + residual) on dense memory.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/epilogue.h"

namespace sparse_adv {

// Tensors in one layout, cut into runs of consecutive elements: NCHW, a run has the pixels of one channel of an image,
// and channels_last the channels of one pixel.
template <class T>
struct Pointwise {
  const T* input;
  T* out;  // may be input
  Epilogue<T> epilogue;
  int64_t channels;
  bool channels_last;
  int64_t rows, row_size;  // of a run: the rows of the gate, or one row if its bytes have no gaps within a run
};

// The runs from `begin` to `end` - 1; T is float or double.
SPARSE_ADV_FOR_EACH_ISA(template <class T> void pointwise(const Pointwise<T>& operands, int64_t begin, int64_t end))

}  // namespace sparse_adv
