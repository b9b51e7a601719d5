// Counter-based noise: element i of a batch (in NCHW order) gets word i % 4 of the Philox4x32-10 block with counter
// i / 4 + offset, so the noise does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

struct Noise {
  uint64_t key, offset;
  double eps, lo, hi;
};

// out[i] = clamp(clean[i] + U(-eps, eps), lo, hi) for the elements begin <= i < end; T is float or double.
SPARSE_ADV_FOR_EACH_ISA(template <class T>
                        void random_start_linf(const T* clean, T* out, int64_t begin, int64_t end, const Noise& noise))

// The same with noise uniform in the l2 ball, for image `sample` of `count` elements; out is not clean.
SPARSE_ADV_FOR_EACH_ISA(template <class T>
                        void random_start_l2(const T* clean, T* out, int64_t sample, int64_t count, const Noise& noise))

}  // namespace sparse_adv
