#include "cpu/masked_winograd_conv2d/weight_kernel.h"

#include "cpu/winograd_conv2d/transforms.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

constexpr int kSide = 6;  // rows and columns of a transformed filter

// taps[tap][lane] = the weights that are kept of one filter.
static inline void gather_taps(const MaskedFilters& source, int64_t out, int64_t in, int lane, float taps[9][kLanes]) {
  if (out >= source.weight.out_channels) {
    for (int tap = 0; tap < 9; ++tap) taps[tap][lane] = 0.0f;
    return;
  }
  const WinogradWeight& weight = source.weight;
  const float* w = weight.first + out * weight.out_stride + in * weight.in_stride;
  const uint8_t* kept = source.mask + out * source.out_stride + in * source.in_stride;
  for (int tap = 0; tap < 9; ++tap) {
    const float value = w[tap / 3 * weight.row_stride + tap % 3 * weight.col_stride];
    taps[tap][lane] = kept[tap * source.tap_stride] ? value : 0.0f;
  }
}

void masked_winograd_weight(const MaskedFilters& source, const LiveFilters& filters, const int32_t* rows, int64_t begin,
                            int64_t end, float* values) {
  const int block = static_cast<int>(filters.oc_block), filters_of_vector = kLanes / block;
  const int64_t pitch = filters.count * block;
  for (int64_t first = begin; first < end; first += filters_of_vector) {
    const int64_t left = end - first;
    const int count = left < filters_of_vector ? static_cast<int>(left) : filters_of_vector;
    float taps[9][kLanes] = {};
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < block; ++j)
        gather_taps(source, static_cast<int64_t>(rows[first + i]) * block + j, filters.channels[first + i],
                    i * block + j, taps);
    Vec g[9], half[kSide * 3], result[kElements];
    for (int tap = 0; tap < 9; ++tap) g[tap] = load(taps[tap]);
    for (int s = 0; s < 3; ++s) transform_taps<4>(g + s, 3, half + s, 3);
    for (int i = 0; i < kSide; ++i) transform_taps<4>(half + 3 * i, 1, result + kSide * i, 1);
    for (int i = 0; i < kElements; ++i) store_up_to(values + i * pitch + first * block, result[i], count * block);
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
