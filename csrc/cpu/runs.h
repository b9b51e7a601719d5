// How the elementwise kernels cut tensors of one layout: into runs of consecutive elements.
#pragma once

#include <cstdint>

namespace sparse_adv {

// In NCHW a run has the pixels of one channel of an image. In channels_last, and where an image is one pixel, it has
// the channels of one pixel.
struct Runs {
  int64_t channels;
  bool channels_last;
  int64_t rows, row_size;  // of a run: the rows of the gate, or one row if its bytes have no gaps within a run
  // The kernels prefetch what they read and write this many elements later. Otherwise each store would wait for its
  // cache line, and so would each load of a kernel that visits one channel of all images, which lie far apart. 128 to
  // 2,048 are as good (docs/design/batch_norm_act.md).
  int64_t ahead = 512;

  [[gnu::always_inline]] int64_t size() const { return rows * row_size; }
};

}  // namespace sparse_adv
