// The geometry of a pass along one axis of the images.
//
// Every pass is a sum over taps of a shifted image, at unit stride:
// - forward with stride s: padded column u goes to plane u % s, position u / s, so that neighbouring outputs of a tap
//   read neighbouring vectors whatever the stride;
// - grad_input with stride s: the output columns of each remainder modulo s are a unit-stride convolution with the taps
//   of that remainder (an output phase); all phases read one window.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_adv {

struct Axis {
  int64_t source_size, output_size;
  int64_t source_phases, output_phases;
  int64_t extent;  // positions per output phase
  int64_t pad;     // padded coordinate of source 0
  struct Tap {
    int64_t source_phase, output_phase, shift;  // position m of the output phase reads position m + shift
  };
  std::vector<Tap> taps;
  int64_t max_shift;

  static Axis forward(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                      int64_t dilation);
  static Axis grad_input(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                         int64_t dilation);

  // Whether every position reads its taps at unit stride, and writes so.
  bool is_unit() const { return source_phases == 1 && output_phases == 1; }
  // Of each source phase, whether some tap reads it.
  std::vector<bool> phases_read() const;
};

}  // namespace sparse_adv
