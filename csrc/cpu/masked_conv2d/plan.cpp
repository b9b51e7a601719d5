#include "cpu/masked_conv2d/plan.h"

#include <utility>

namespace sparse_adv {

namespace {

// The cost model that chooses the kernel. Its unit of time is one multiply-add of the dense convolution. It was fitted
// by non-negative least squares of relative errors to 1,060 timings of each pass on AVX-512: 22 layers of 3 to 512
// channels and 2 to 112 pixels, batch 1 to 64, density 0.05 to 0.5 (docs/design/masked_conv2d.md). 80 % of the
// predictions are within 0.7 and 1.2 of the measured time.

// Converting an element of input or output to the layout of the kernels and back: 14 for all passes; the fit for
// grad_weight alone was 10.
constexpr double kPerElement = 14;
// Checking, converting and packing one weight that the mask keeps, once per call: 250, the sort by column included. If
// the weights are packed already, no value is gathered, and the sort is counted on its own, for each column index,
// which stands for `oc_block` weights (fitted to 480 timings at batch 1 to 8).
double cost_per_kept_weight(bool packed) { return packed ? 40 : 250; }
constexpr double kPerSortedIndex = 400;
constexpr double kPerCall = 4e6;  // of the same fit
// The sparse kernel must be predicted to be faster by this factor. With it, the sparse kernel was chosen and more than
// 5 % slower in 2, 4 and 0 of the 1,060 cases of the three passes; in 5 to 7 % of them a gain was missed, by 1.2x in
// the median, which nn.tune finds.
constexpr double kMargin = 1.15;

// A strided grad_input goes through all weights, and keeps accumulators, for each output phase, also for those that no
// tap reaches: a 1x1 filter of stride 512 took 9.9 s and 2.5 GB. The number is chosen, not tuned.
constexpr int64_t kMaxPhasesPerTap = 16;

// One multiply-add of a kept weight: 1.87 (grad_weight 1.7) for an oc_block of 1; for 2 and 4, which share each load of
// the input, 1.13 to 1.4 and 1.04 to 1.2. Rounded to values that suit all three passes. The factor of portable code,
// with vectors of 4 lanes, is chosen, not fitted.
double cost_per_kept_mac(Pass pass, int64_t oc_block) {
  const double shared = oc_block == 4 ? 1.15 : 1.25;
  const double simd = oc_block > 1 ? shared : pass == Pass::grad_weight ? 1.7 : 1.9;
  return cpu_capability() == Capability::portable ? 3 * simd : simd;
}

// The dense pass, in addition to its multiply-adds: for an element of input and output, for a weight, kept or not,
// which PyTorch reorders in each call and which is masked before, unless the weights are packed, and for a call. The
// last two were fitted to 272 timings of each pass, of 1 x 1, grouped and depthwise layers and small images on a Zen 4.
double dense_cost_per_element(Pass pass) { return pass == Pass::forward ? 23 : pass == Pass::grad_input ? 40 : 10; }
double dense_cost_per_weight(Pass pass, bool packed) { return pass == Pass::grad_weight ? 160 : packed ? 60 : 90; }
constexpr double kDensePerCall = 4e6;

// The multiply-adds of the dense pass of one image. The channels of small groups fill no vector, and oneDNN has kernels
// for few shapes of depthwise layers: their grad_weight takes up to 34 times as long as the sparse one. All numbers are
// of the fit to 272 timings.
double dense_cost_of_macs(Pass pass, const ConvParams& conv, double macs) {
  if (conv.groups == 1 || conv.C / conv.groups >= 16) return macs;
  const double per_weight = pass == Pass::forward ? 20 : pass == Pass::grad_input ? 15 : 80;
  return (pass == Pass::grad_weight ? 4 : 1) * macs + per_weight * static_cast<double>(conv.weights());
}

bool sparse_is_faster(const Pattern& pattern, const ConvParams& conv, Pass pass, int64_t oc_block,
                      const Blocking& blocking) {
  const auto batch = static_cast<double>(conv.N);
  const auto weights = static_cast<double>(conv.weights());
  const auto pixels = static_cast<double>(conv.P * conv.Q);
  const auto elements = static_cast<double>(conv.C * conv.H * conv.W + conv.K * conv.P * conv.Q);
  const auto kept_weights = static_cast<double>(pattern.kept_weights);
  const bool packed = pattern.weight_is_masked && pass != Pass::grad_weight;
  const bool sorts = blocking.output_phases() > 1 || (packed && blocking.can_sort_by_column(oc_block));
  const double packing = cost_per_kept_weight(packed) + (sorts ? kPerSortedIndex / static_cast<double>(oc_block) : 0);
  const double sparse =
      cost_per_kept_mac(pass, oc_block) * kept_weights * static_cast<double>(blocking.computed_positions()) +
      kPerElement * elements * static_cast<double>(blocking.padded_batch()) + packing * kept_weights + kPerCall;
  // The timings above are without dilation. A dilation spreads the taps: each band fills a larger halo for them, while
  // the dense forward and grad_input skip those that read padding. 33x33 pixels, 256 to 128 channels, (4, 4) at 0.1 on
  // AVX2: sparse 10, 32 and 52 ms, dense 56, 35 and 18 ms with a dilation of 1, 12 and 24.
  const bool skips = conv.is_dilated() && pass != Pass::grad_weight;
  const double halo = conv.is_dilated() ? kPerElement * blocking.filled_floats() : 0;
  const double macs = weights * pixels * (skips ? conv.share_inside() : 1);
  const double dense = batch * (dense_cost_of_macs(pass, conv, macs) + dense_cost_per_element(pass) * elements) +
                       dense_cost_per_weight(pass, packed) * weights + kDensePerCall;
  return kMargin * (sparse + halo) < dense;
}

// Whether there is a sparse kernel for these images at all.
bool sparse_is_possible(const ConvParams& conv, torch::headeronly::ScalarType dtype) {
  constexpr int64_t kMaxPixels = int64_t{1} << 31;  // the kernels count pixels in int32
  return dtype == torch::headeronly::ScalarType::Float && conv.N > 0 && conv.C > 0 && conv.H > 0 && conv.W > 0 &&
         conv.K > 0 && conv.H * conv.W < kMaxPixels && conv.P * conv.Q < kMaxPixels;
}

}  // namespace

Plan make_plan(const Pattern& pattern, const ConvParams& conv, Pass pass, torch::headeronly::ScalarType dtype,
               bool channels_last, bool gated) {
  const int64_t positions = conv.N * conv.P * conv.Q;
  const Plan dense{.kernel = Kernel::dense, .macs = positions * conv.weights(), .blocking = std::nullopt};
  const auto requested = static_cast<Kernel>(pattern.requested_kernel[static_cast<int>(pass)]);
  if (requested == Kernel::dense || !sparse_is_possible(conv, dtype)) return dense;
  const auto blocking_with = [&](bool with_gate) {
    return pass == Pass::forward      ? forward_blocking(conv, pattern, channels_last, with_gate)
           : pass == Pass::grad_input ? grad_input_blocking(conv, pattern, channels_last, with_gate)
                                      : grad_weight_blocking(conv, pattern, channels_last);
  };
  Blocking blocking = blocking_with(false);
  if (!blocking.fits_int32() || blocking.output_phases() > kMaxPhasesPerTap * conv.R * conv.S) return dense;
  const int64_t oc_block = pass == Pass::grad_input ? pattern.grad_input_oc_block : pattern.forward_oc_block;
  if (requested != Kernel::sparse && !sparse_is_faster(pattern, conv, pass, oc_block, blocking)) return dense;
  if (gated) blocking = blocking_with(true);
  if (!blocking.fits_int32()) return dense;  // the layout with a gate may need more memory than the one without
  return {.kernel = Kernel::sparse, .macs = positions * pattern.kept_weights, .blocking = std::move(blocking)};
}

}  // namespace sparse_adv
