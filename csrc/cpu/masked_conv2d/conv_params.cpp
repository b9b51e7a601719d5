#include "cpu/masked_conv2d/conv_params.h"

#include <algorithm>

#include "common/errors.h"
#include "common/rounding.h"
#include "common/tensor_checks.h"

namespace sparse_adv {

using torch::stable::Tensor;

namespace {

// For rows or for columns: whether each window of `taps` reads one of `pixels`. The first and last window do not decide
// it, because a dilation larger than the image can step over it: with 1 pixel, 2 taps, dilation 4 and padding 4,
// windows 0 and 4 read the pixel and windows 1 to 3 do not.
bool every_window_reads(int64_t pixels, int64_t taps, int64_t windows, int64_t stride, int64_t padding,
                        int64_t dilation) {
  for (int64_t i = 0; i < windows; ++i) {
    const int64_t start = i * stride - padding;
    const int64_t skipped = start < 0 ? divide_up(-start, dilation) : 0;  // taps before the first pixel
    if (skipped >= taps || start + skipped * dilation >= pixels) return false;
  }
  return true;
}

// For rows or for columns: of all pairs of a window and a tap, the share that reads one of `pixels`.
double share_inside(int64_t pixels, int64_t taps, int64_t windows, int64_t stride, int64_t padding, int64_t dilation) {
  int64_t inside = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t before = padding - tap * dilation;  // pixels that window 0 reads before the first one
    const int64_t first = before > 0 ? divide_up(before, stride) : 0;
    const int64_t end = pixels + before > 0 ? (pixels + before - 1) / stride + 1 : 0;
    inside += std::max<int64_t>(std::min(end, windows) - first, 0);
  }
  return static_cast<double>(inside) / static_cast<double>(taps * windows);
}

}  // namespace

double ConvParams::share_inside() const {
  return sparse_adv::share_inside(H, R, P, stride[0], padding[0], dilation[0]) *
         sparse_adv::share_inside(W, S, Q, stride[1], padding[1], dilation[1]);
}

bool ConvParams::every_window_reads() const {
  return sparse_adv::every_window_reads(H, R, P, stride[0], padding[0], dilation[0]) &&
         sparse_adv::every_window_reads(W, S, Q, stride[1], padding[1], dilation[1]);
}

ConvParams make_conv_params(const Pattern& pattern, const std::vector<int64_t>& input_size,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  check(input_size.size() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "an image has 4 sizes, stride, padding and dilation have 2 each");
  check(groups == pattern.groups, "groups is ", groups, ", the pattern was compiled for ", pattern.groups);
  ConvParams conv{};
  conv.N = input_size[0];
  conv.C = input_size[1];
  conv.H = input_size[2];
  conv.W = input_size[3];
  conv.K = pattern.out_channels;
  conv.R = pattern.filter_rows;
  conv.S = pattern.filter_cols;
  conv.groups = groups;
  check(conv.C == pattern.in_channels(), "input has ", conv.C, " channels, the pattern ", pattern.in_channels());
  check(conv.N == 0 || (conv.H > 0 && conv.W > 0), "input must have pixels, got ", conv.H, " x ", conv.W);
  for (int i = 0; i < 2; ++i) {
    check(stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0,
          "stride and dilation must be positive, padding must not be negative");
    check(stride[i] < (1 << 20) && dilation[i] < (1 << 20) && padding[i] < (1 << 20),
          "stride, padding and dilation must be less than ", 1 << 20);
    conv.stride[i] = stride[i];
    conv.padding[i] = padding[i];
    conv.dilation[i] = dilation[i];
  }
  auto output_size = [&](int64_t size, int64_t filter, int i) {
    const int64_t span = size + 2 * padding[i] - dilation[i] * (filter - 1) - 1;
    check(span >= 0 && filter >= 1, "the filter is larger than the padded image");
    return span / stride[i] + 1;
  };
  conv.P = output_size(conv.H, conv.R, 0);
  conv.Q = output_size(conv.W, conv.S, 1);
  int64_t pixels, positions, macs;
  check(!__builtin_mul_overflow(conv.P, conv.Q, &pixels) && !__builtin_mul_overflow(conv.N, pixels, &positions) &&
            !__builtin_mul_overflow(positions, conv.weights(), &macs),
        "an output of ", conv.N, " x ", conv.P, " x ", conv.Q, " pixels is too large");
  return conv;
}

void check_weight(const Pattern& pattern, const Tensor& weight, const Tensor& images) {
  check_size("weight", weight,
             {pattern.out_channels, pattern.group_in_channels, pattern.filter_rows, pattern.filter_cols});
  check_dtype("weight", weight, "the images", images);
}

}  // namespace sparse_adv
