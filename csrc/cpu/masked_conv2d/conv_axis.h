// The geometry of a pass along one axis of the images, rows or columns.
//
// Every pass is a sum over filter taps of a shifted image, read at unit stride. A stride s splits an axis into phases,
// the positions with one remainder modulo s:
// - forward: padded source column u is position u / s of source phase u % s. For any stride, neighbouring outputs then
//   read neighbouring positions of one phase.
// - grad_input: the output columns of one phase are a unit-stride convolution with the taps that reach this phase. All
//   output phases read the same source.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_adv {

struct ConvAxis {
  int64_t source_size, output_size;  // pixels that the pass reads and writes
  int64_t source_phases, output_phases;
  int64_t positions;  // per output phase
  int64_t pad;        // padded coordinate of the first source pixel
  struct Tap {
    int64_t source_phase, output_phase, shift;  // position m of the output phase reads position m + shift
  };
  std::vector<Tap> taps;
  int64_t max_shift;

  static ConvAxis forward(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                          int64_t dilation);
  static ConvAxis grad_input(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                             int64_t dilation);

  // Whether the axis has one source phase and one output phase: positions are then neighbouring pixels.
  bool is_unit_stride() const { return source_phases == 1 && output_phases == 1; }
  // For each source phase, whether some tap reads it.
  std::vector<bool> phases_read() const;
  int64_t phases_read_count() const;
};

}  // namespace sparse_adv
