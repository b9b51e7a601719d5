#include "cpu/path.h"

#include "cpu/window.h"

namespace sparse_adv {

namespace {

// The static table: what a pass costs, in multiply-adds of the dense convolution. Fitted to 1,008 timings of each pass
// on AVX-512 (15 layers of 3 to 512 channels and 4 to 32 pixels, batch 4 to 64, density 0.1 to 0.7), with a margin, so
// that taking the sparse path where it is slower is rare; the price is some missed gains near the break-even, which
// nn.tune finds. benchmarks/NOTES.md has the numbers.
constexpr double kPerSparseElement = 40;  // converting an element of input or output to lanes and back
constexpr double kPerDenseElement = 30;   // reading and writing it
constexpr double kPerKeptWeight = 300;    // checking, gathering and placing it, once per call
constexpr double kPerCall = 2e6;

// A kept weight's multiply-add: a vector of 4 output channels reuses each loaded pixel four times, grad_weight none.
double per_kept(Pass pass, int64_t vector) {
  const double on_simd = pass == Pass::grad_weight ? 2.2 : vector == 4 ? 1.35 : vector == 2 ? 1.9 : 2.0;
  return cpu_capability() == Capability::portable ? 3 * on_simd : on_simd;
}

bool sparse_is_faster(const Pattern& pattern, const Convolution& conv, Pass pass, int64_t vector) {
  const int64_t lanes = SPARSE_ADV_CHOOSE(lane_count)();
  const auto batch = static_cast<double>(conv.N), padded = static_cast<double>((conv.N + lanes - 1) / lanes * lanes);
  const auto weights = static_cast<double>(conv.K * pattern.group_in_channels * conv.R * conv.S);
  const auto pixels = static_cast<double>(conv.P * conv.Q);
  const auto elements = static_cast<double>(conv.C * conv.H * conv.W + conv.K * conv.P * conv.Q);
  // A strided grad_input sorts the lists into phases and writes single pixels.
  const bool strided = pass == Pass::grad_input && (conv.stride[0] > 1 || conv.stride[1] > 1);
  const double kept = static_cast<double>(pattern.kept);
  const double sparse = padded * (per_kept(pass, vector) * (strided ? 1.5 : 1) * kept * pixels +
                                  kPerSparseElement * (strided ? 2 : 1) * elements) +
                        kPerKeptWeight * (strided ? 2 : 1) * kept + kPerCall;
  return sparse < batch * (weights * pixels + kPerDenseElement * elements);
}

}  // namespace

Path choose_path(const Pattern& pattern, const Convolution& conv, Pass pass, torch::headeronly::ScalarType dtype) {
  const auto asked = static_cast<Path>(pattern.path[static_cast<int>(pass)]);
  const bool possible = dtype == torch::headeronly::ScalarType::Float && conv.N > 0 && conv.C > 0 && conv.H > 0 &&
                        conv.W > 0 && conv.K > 0;
  constexpr int64_t kMaxPixels = int64_t{1} << 31;  // the kernels number pixels in int32
  if (conv.H * conv.W >= kMaxPixels || conv.P * conv.Q >= kMaxPixels) return Path::dense;
  if (!possible || asked == Path::dense) return Path::dense;
  const Window window = pass == Pass::grad_input ? grad_input_window(conv) : forward_window(conv);
  if (!window.fits_int32(SPARSE_ADV_CHOOSE(lane_count)())) return Path::dense;
  if (asked == Path::sparse) return Path::sparse;
  const int64_t vector = pass == Pass::grad_input ? pattern.grad_input_vector : pattern.forward_vector;
  return sparse_is_faster(pattern, conv, pass, vector) ? Path::sparse : Path::dense;
}

}  // namespace sparse_adv
