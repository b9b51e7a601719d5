#include "cpu/masked_conv2d/conv_axis.h"

#include <algorithm>

#include "common/rounding.h"

namespace sparse_adv {

ConvAxis ConvAxis::forward(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                           int64_t dilation) {
  ConvAxis axis{.source_size = source,
                .output_size = output,
                .source_phases = stride,
                .output_phases = 1,
                .positions = output,
                .pad = padding,
                .taps = {},
                .max_shift = 0};
  for (int64_t t = 0; t < filter; ++t) {
    axis.taps.push_back({.source_phase = t * dilation % stride, .output_phase = 0, .shift = t * dilation / stride});
    axis.max_shift = std::max(axis.max_shift, axis.taps.back().shift);
  }
  return axis;
}

ConvAxis ConvAxis::grad_input(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                              int64_t dilation) {
  // Output y = stride * m + phase gets tap t from source row (y + padding - t * dilation) / stride if that is whole.
  ConvAxis axis{.source_size = source,
                .output_size = output,
                .source_phases = 1,
                .output_phases = stride,
                .positions = divide_up(output, stride),
                .pad = 0,
                .taps = {},
                .max_shift = 0};
  for (int64_t t = 0; t < filter; ++t) {
    const int64_t distance = t * dilation - padding, phase = (distance % stride + stride) % stride;
    axis.taps.push_back({.source_phase = 0, .output_phase = phase, .shift = (phase - distance) / stride});
    axis.pad = std::max(axis.pad, -axis.taps.back().shift);
  }
  for (Tap& tap : axis.taps) {
    tap.shift += axis.pad;
    axis.max_shift = std::max(axis.max_shift, tap.shift);
  }
  return axis;
}

std::vector<bool> ConvAxis::phases_read() const {
  std::vector<bool> read(source_phases);
  for (const Tap& tap : taps) read[tap.source_phase] = true;
  return read;
}

int64_t ConvAxis::phases_read_count() const {
  const std::vector<bool> read = phases_read();
  return std::count(read.begin(), read.end(), true);
}

}  // namespace sparse_adv
