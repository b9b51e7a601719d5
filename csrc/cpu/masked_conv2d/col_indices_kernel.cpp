#include "cpu/masked_conv2d/col_indices_kernel.h"

#include "cpu/masked_conv2d/pattern_layout.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

bool col_indices_inside(const int32_t* col_indices, int64_t count, int64_t channels, int64_t taps) {
  const auto channel_end = static_cast<uint32_t>(channels), tap_end = static_cast<uint32_t>(taps);
  uint32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<uint32_t>(col_indices[i]);
    outside |= static_cast<uint32_t>(index >> kTapBits >= channel_end) |
               static_cast<uint32_t>((index & (kMaxTaps - 1)) >= tap_end);
  }
  return outside == 0;
}

bool col_indices_in_triples(const int32_t* col_indices, int64_t count) {
  int32_t wrong = count % 3;
  for (int64_t i = 0; i + 2 < count; i += 3)
    wrong |= (col_indices[i] & (kMaxTaps - 1)) % 3 | (col_indices[i + 1] - col_indices[i] - 1) |
             (col_indices[i + 2] - col_indices[i] - 2);
  return wrong == 0;
}

void col_indices_to_offsets(const int32_t* col_indices, int64_t count, int32_t panel_mask, int32_t channel_pitch,
                            const int32_t* tap_offset, int32_t* offsets) {
  for (int64_t i = 0; i < count; ++i)
    offsets[i] =
        (col_indices[i] >> kTapBits & panel_mask) * channel_pitch + tap_offset[col_indices[i] & (kMaxTaps - 1)];
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
