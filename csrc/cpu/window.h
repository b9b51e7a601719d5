// How one pass reads the images: the geometry of a convolution along each axis, cut into strips of output rows whose
// window (padding included, lane = sample) fits the L2 cache.
//
// Every pass is a sum over taps of a shifted image, at unit stride:
// - forward with stride s: padded column u goes to plane u % s, position u / s, so that neighbouring outputs of a tap
//   read neighbouring vectors whatever the stride;
// - grad_input with stride s: the output columns of each remainder modulo s are a unit-stride convolution with the taps
//   of that remainder (an output phase); all phases read one window.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/lane_layout_kernel.h"
#include "cpu/masked_conv2d_kernel.h"

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
  int64_t output_origin;  // output of position m and phase a: m * output_phases + a + output_origin

  static Axis forward(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                      int64_t dilation);
  static Axis grad_input(int64_t source, int64_t output, int64_t filter, int64_t stride, int64_t padding,
                         int64_t dilation);
  int64_t output(int64_t position, int64_t phase) const { return position * output_phases + phase + output_origin; }
  // The positions first .. last - 1 of [begin, end) whose output of this phase lies in the image.
  struct Range {
    int64_t first, last;
  };
  Range inside(int64_t begin, int64_t end, int64_t phase) const;
};

struct Window {
  Axis rows, cols;
  int64_t channels;
  int tile_rows, tile_cols;
  int64_t strip;  // positions (of rows) per strip: a multiple of tile_rows
  int64_t strips;
  int64_t window_cols;                 // vectors per source phase and row
  int64_t row_pitch;                   // vectors from one window row to the next
  int64_t plane;                       // vectors per channel
  int64_t sums_row_pitch, sums_plane;  // the same of the computed sums

  // A strip of more than one tile row reads and writes at most `bytes`; output_channels are written.
  Window(Axis rows, Axis cols, int64_t channels, int64_t output_channels, int lanes, int64_t bytes);

  int64_t phases() const { return rows.output_phases * cols.output_phases; }
  // Vector offset of a tap from the position it belongs to, or -1 if it is of another phase.
  int64_t tap_offset(int64_t tap, int64_t phase) const;
  bool fits_int32(int lanes) const { return channels * plane * lanes < (int64_t{1} << 31); }
};

// The windows of the two passes, for the instruction set in use.
Window forward_window(const Convolution& conv);
Window grad_input_window(const Convolution& conv);

// The buffers that a thread fills for a strip; they keep their memory from call to call.
struct StripPlacement {
  std::vector<int32_t> place, gaps;
  Placement describe(const Window& window, int64_t strip);
};

// Where the sums of a strip go in the output, for one phase; replaces `runs`.
void describe_runs(const Window& window, int64_t strip, int64_t phase, std::vector<Run>& runs);

}  // namespace sparse_adv
