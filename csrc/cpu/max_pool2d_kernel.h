// Max pooling with a stride of the window's size, and its gradient.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

// One row of windows. NCHW: `step` = 1 and the window's columns are `cols` pixels; channels_last: `step` channels lie
// between two pixels, and they are pooled side by side. Of each window the number of its largest element, row by row,
// is kept as a byte; a NaN counts as larger than any number, as in PyTorch.
struct PoolRow {
  int64_t windows;     // in the row
  int64_t rows, cols;  // of a window
  int64_t row_pitch;   // elements from one row of the input to the next
  int64_t step;
};

// T is float or double. `index` may be null.
SPARSE_ADV_FOR_EACH_ISA(template <class T>
                        void max_pool2d_row(const PoolRow& row, const T* input, T* out, uint8_t* index))

// Writes all elements of the windows: grad at the largest one, 0 at the others, plus the residual, which may be null or
// grad_input.
SPARSE_ADV_FOR_EACH_ISA(template <class T> void max_pool2d_grad_row(const PoolRow& row, const T* grad,
                                                                    const uint8_t* index, const T* residual,
                                                                    T* grad_input))

}  // namespace sparse_adv
