#include "cpu/masked_conv2d/plan.h"

#include <utility>

namespace sparse_adv {

namespace {

// The static table: what a pass costs, in multiply-adds of the dense convolution. Fitted to 1,000 timings of each pass
// on AVX-512 (22 layers of 3 to 512 channels and 2 to 112 pixels, batch 1 to 64, density 0.05 to 0.5), with a margin,
// so that taking the sparse kernel where it is slower is rare; the price is some missed gains near the break-even,
// which nn.tune finds. docs/design/masked_conv2d.md has the numbers.
constexpr double kPerElement = 14;      // moving an element of input or output to lanes and back
constexpr double kPerKeptWeight = 250;  // checking, gathering and placing it, once per call
constexpr double kPerCall = 4e6;
constexpr double kMargin = 1.15;

// A kept weight's multiply-add: a vector of 2 or 4 output channels shares each load.
double per_kept(Pass pass, int64_t vector) {
  const double shared = vector == 4 ? 1.15 : 1.25;
  const double on_simd = vector > 1 ? shared : pass == Pass::grad_weight ? 1.7 : 1.9;
  return cpu_capability() == Capability::portable ? 3 * on_simd : on_simd;
}

double per_dense_element(Pass pass) { return pass == Pass::forward ? 23 : pass == Pass::grad_input ? 40 : 10; }

bool sparse_is_faster(const Pattern& pattern, const Convolution& conv, Pass pass, int64_t vector,
                      const Window& window) {
  const auto batch = static_cast<double>(conv.N);
  const auto weights = static_cast<double>(conv.weights());
  const auto pixels = static_cast<double>(conv.P * conv.Q);
  const auto elements = static_cast<double>(conv.C * conv.H * conv.W + conv.K * conv.P * conv.Q);
  // A strided grad_input sorts the lists into phases, on one thread.
  const bool strided = pass == Pass::grad_input && window.phases() > 1;
  const auto kept = static_cast<double>(pattern.kept);
  const double sparse = per_kept(pass, vector) * kept * static_cast<double>(window.computed_positions()) +
                        kPerElement * elements * static_cast<double>(window.padded_batch()) +
                        kPerKeptWeight * (strided ? 3 : 1) * kept + kPerCall;
  return kMargin * sparse < batch * (weights * pixels + per_dense_element(pass) * elements);
}

// Whether the sparse kernel exists for these images at all.
bool sparse_is_possible(const Convolution& conv, torch::headeronly::ScalarType dtype) {
  constexpr int64_t kMaxPixels = int64_t{1} << 31;  // the kernels number pixels in int32
  return dtype == torch::headeronly::ScalarType::Float && conv.N > 0 && conv.C > 0 && conv.H > 0 && conv.W > 0 &&
         conv.K > 0 && conv.H * conv.W < kMaxPixels && conv.P * conv.Q < kMaxPixels;
}

}  // namespace

Plan make_plan(const Pattern& pattern, const Convolution& conv, Pass pass, torch::headeronly::ScalarType dtype,
               bool channels_last) {
  const int64_t positions = conv.N * conv.P * conv.Q;
  const Plan dense{.kernel = Kernel::dense, .macs = positions * conv.weights(), .window = std::nullopt};
  const auto requested = static_cast<Kernel>(pattern.requested_kernel[static_cast<int>(pass)]);
  if (requested == Kernel::dense || !sparse_is_possible(conv, dtype)) return dense;
  Window window = pass == Pass::grad_input ? grad_input_window(conv, pattern, channels_last)
                                           : forward_window(conv, pattern, channels_last);
  if (!window.fits_int32()) return dense;
  const int64_t vector = pass == Pass::grad_input ? pattern.grad_input_vector : pattern.forward_vector;
  if (requested != Kernel::sparse && !sparse_is_faster(pattern, conv, pass, vector, window)) return dense;
  return {.kernel = Kernel::sparse, .macs = positions * pattern.kept, .window = std::move(window)};
}

}  // namespace sparse_adv
