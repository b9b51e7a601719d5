#include "cpu/masked_conv2d/width_layout_kernel.h"

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

static inline void clear_rows(float* from, int64_t count, const RowPlacement& placement) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < placement.data; i += kLanes) store(from + r * placement.pitch + i, broadcast(0.0f));
}

void fill_rows(const float* image, int64_t pixels, const RowPlacement& placement, int64_t first_channel,
               int64_t last_channel, float* window) {
  const int64_t whole = placement.row_size / kLanes * kLanes, below = placement.row_at + placement.row_count;
  const int rest = static_cast<int>(placement.row_size - whole);
  for (int64_t c = first_channel; c < last_channel; ++c) {
    const float* from = image + c * pixels + placement.first_row * placement.row_size;
    float* const plane = window + (c - first_channel) * placement.plane;
    clear_rows(plane, placement.row_at, placement);
    clear_rows(plane + below * placement.pitch, placement.rows - below, placement);
    float* to = plane + placement.row_at * placement.pitch;
    for (int64_t r = 0; r < placement.row_count; ++r, from += placement.row_size, to += placement.pitch) {
      int64_t i = 0;
      for (; i < whole; i += kLanes) store(to + i, load(from + i));
      if (rest > 0) {
        store(to + i, load_first(from + i, rest));
        i += kLanes;
      }
      for (; i < placement.data; i += kLanes) store(to + i, broadcast(0.0f));
    }
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
