#include "cpu/masked_conv2d/conv_geometry.h"

#include <algorithm>

namespace sparse_adv {

Axis Axis::forward(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
  Axis axis{source, output, stride, 1, output, padding, {}, 0};
  for (int64_t t = 0; t < filter; ++t) {
    axis.taps.push_back({t * dilation % stride, 0, t * dilation / stride});
    axis.max_shift = std::max(axis.max_shift, axis.taps.back().shift);
  }
  return axis;
}

Axis Axis::grad_input(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                      int64_t dilation) {
  // Output y = stride * m + phase gets tap t from source row (y + padding - t * dilation) / stride where that is whole.
  Axis axis{source, output, 1, stride, (output + stride - 1) / stride, 0, {}, 0};
  for (int64_t t = 0; t < filter; ++t) {
    const int64_t behind = t * dilation - padding, phase = (behind % stride + stride) % stride;
    axis.taps.push_back({0, phase, (phase - behind) / stride});
    axis.pad = std::max(axis.pad, -axis.taps.back().shift);
  }
  for (Tap& tap : axis.taps) {
    tap.shift += axis.pad;
    axis.max_shift = std::max(axis.max_shift, tap.shift);
  }
  return axis;
}

std::vector<bool> Axis::phases_read() const {
  std::vector<bool> read(source_phases);
  for (const Tap& tap : taps) read[tap.source_phase] = true;
  return read;
}

}  // namespace sparse_adv
