#include "cpu/masked_conv2d/col_indices_kernel.h"

#include "common/pattern_layout.h"

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

bool find_filter_rows(const int32_t* col_indices, const int32_t* row_offsets, Range rows, int64_t filter_rows,
                      int64_t filter_cols, int32_t* starts) {
  constexpr auto kTap = static_cast<int32_t>(kMaxTaps - 1);
  int32_t unsorted = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int32_t* const indices = col_indices + row_offsets[row];
    const int32_t count = row_offsets[row + 1] - row_offsets[row];
    int32_t* const row_starts = starts + row * (filter_rows + 1);
    row_starts[0] = 0;
    row_starts[filter_rows] = count;
    for (int64_t r = 1; r < filter_rows; ++r) {
      const auto first_tap = static_cast<int32_t>(r * filter_cols);
      int32_t before = 0;
      for (int32_t i = 0; i + 1 < count; ++i) {
        const int32_t is_before = (indices[i] & kTap) < first_tap, next_is_before = (indices[i + 1] & kTap) < first_tap;
        before += is_before;
        unsorted |= next_is_before & ~is_before;
      }
      row_starts[r] = before + (count > 0 && (indices[count - 1] & kTap) < first_tap);
    }
  }
  return unsorted == 0;
}

void col_indices_to_offsets(const int32_t* col_indices, int64_t count, int32_t slice_mask, int32_t channel_pitch,
                            const int32_t* tap_offset, int32_t* offsets) {
  for (int64_t i = 0; i < count; ++i)
    offsets[i] =
        (col_indices[i] >> kTapBits & slice_mask) * channel_pitch + tap_offset[col_indices[i] & (kMaxTaps - 1)];
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
