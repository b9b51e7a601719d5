#include "cpu/masked_conv2d/col_indices_kernel.h"

#include "cpu/masked_conv2d/pattern_layout.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

bool entries_inside(const int32_t* entries, int64_t count, int64_t channels, int64_t taps) {
  const auto channel_end = static_cast<uint32_t>(channels), tap_end = static_cast<uint32_t>(taps);
  uint32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto entry = static_cast<uint32_t>(entries[i]);
    outside |= static_cast<uint32_t>(entry >> kTapBits >= channel_end) |
               static_cast<uint32_t>((entry & (kMaxTaps - 1)) >= tap_end);
  }
  return outside == 0;
}

bool entries_in_threes(const int32_t* entries, int64_t count) {
  int32_t wrong = count % 3;
  for (int64_t i = 0; i + 2 < count; i += 3)
    wrong |= (entries[i] & (kMaxTaps - 1)) % 3 | (entries[i + 1] - entries[i] - 1) | (entries[i + 2] - entries[i] - 2);
  return wrong == 0;
}

void entry_offsets(const int32_t* entries, int64_t count, int32_t block_mask, int32_t plane, const int32_t* tap_offset,
                   int32_t* offsets) {
  for (int64_t i = 0; i < count; ++i)
    offsets[i] = (entries[i] >> kTapBits & block_mask) * plane + tap_offset[entries[i] & (kMaxTaps - 1)];
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
