// Every kernel of every instruction set that this CPU has, against naive loops in double, without torch: a program to
// build with SPARSE_ADV_SANITIZE. All buffers lie on the heap and are exactly as large as the kernel's contract says,
// and outputs start as NaN: AddressSanitizer sees an access beyond them, and the comparison sees what should not have
// been written or was not.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cpu/capability.h"
#include "cpu/entries_kernel.h"
#include "cpu/lane_layout_kernel.h"
#include "cpu/masked_conv2d_grad_weight_kernel.h"
#include "cpu/masked_conv2d_kernel.h"
#include "cpu/pgd_step_kernel.h"
#include "cpu/random_start_kernel.h"
#include "pattern_layout.h"

using namespace sparse_adv;

namespace {

template <class T>
struct ElementKernels {
  decltype(&portable::pgd_step_linf<T>) step_linf;
  decltype(&portable::pgd_step_l2<T>) step_l2;
  decltype(&portable::random_start_linf<T>) start_linf;
  decltype(&portable::random_start_l2<T>) start_l2;
};

struct Kernels {
  const char* isa;
  int lanes;
  decltype(&portable::fill_window) fill_window;
  decltype(&portable::store_sums) store_sums;
  decltype(&portable::masked_conv2d_tile) conv_tile;
  decltype(&portable::masked_conv2d_grad_weight_tile) grad_weight_tile;
  decltype(&portable::entries_inside) entries_inside;
  decltype(&portable::entry_offsets) entry_offsets;
  ElementKernels<float> of_float;
  ElementKernels<double> of_double;
};

#define ELEMENT_KERNELS(ISA, T) \
  {&ISA::pgd_step_linf<T>, &ISA::pgd_step_l2<T>, &ISA::random_start_linf<T>, &ISA::random_start_l2<T>}
#define KERNELS(ISA)                                                                                                  \
  Kernels {                                                                                                           \
    #ISA, ISA::lane_count(), &ISA::fill_window, &ISA::store_sums, &ISA::masked_conv2d_tile,                           \
        &ISA::masked_conv2d_grad_weight_tile, &ISA::entries_inside, &ISA::entry_offsets, ELEMENT_KERNELS(ISA, float), \
        ELEMENT_KERNELS(ISA, double)                                                                                  \
  }

constexpr float kUntouched = std::numeric_limits<float>::quiet_NaN();

std::mt19937 random_bits(0);

int64_t below(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }

template <class T = float>
std::vector<T> numbers(int64_t count) {
  std::uniform_real_distribution<T> uniform(-1, 1);
  std::vector<T> values(count);
  for (T& value : values) value = uniform(random_bits);
  return values;
}

// Rounding of a few hundred float32 terms below 1, or of one float64 expression.
template <class T>
bool equal(const std::vector<T>& found, const std::vector<double>& expected) {
  const double tolerance = sizeof(T) == sizeof(float) ? 1e-4 : 1e-12;
  return std::ranges::equal(found, expected, [&](double a, double b) {
    return std::isnan(b) ? std::isnan(a) : std::abs(a - b) <= tolerance;
  });
}

Images describe(const float* data, int64_t channels, int64_t pixels, bool channels_last, int count) {
  return {data, channels * pixels, channels, pixels, channels_last, count};
}

int64_t element(const Images& images, int64_t image, int64_t channel, int64_t pixel) {
  return image * images.image_size +
         (images.channels_last ? pixel * images.channels + channel : channel * images.pixels + pixel);
}

bool check_fill_window(const Kernels& kernels, bool channels_last, int count, int64_t first_pixel, bool ascending) {
  const int64_t channels = 2 * kernels.lanes + 3, pixels = 4 * kernels.lanes + 5, plane = pixels + 6;
  const std::vector<float> data = numbers(count * channels * pixels);
  const Images images = describe(data.data(), channels, pixels, channels_last, count);
  // Ascending with a gap after every lanes + 2 pixels, or in reverse with one pixel that goes nowhere.
  std::vector<int32_t> place(pixels - first_pixel), gaps;
  for (int32_t i = 0; i < std::ssize(place); ++i)
    place[i] = ascending ? i + i / (kernels.lanes + 2) : i == 1 ? -1 : static_cast<int32_t>(plane - 2 - i);
  for (int32_t i = 0; i < plane; ++i)
    if (std::ranges::find(place, i) == place.end()) gaps.push_back(i);
  const Placement placement{first_pixel, std::ssize(place), place.data(), gaps.data(), std::ssize(gaps),
                            plane,       ascending};
  const int64_t first = 1, last = channels;
  std::vector<float> window(channels * plane * kernels.lanes, kUntouched);
  kernels.fill_window(images, placement, first, last, window.data());

  std::vector<double> expected(window.size(), kUntouched);
  std::fill(expected.begin() + first * plane * kernels.lanes, expected.end(), 0.0);
  for (int64_t c = first; c < last; ++c)
    for (int64_t p = 0; p < std::ssize(place); ++p)
      for (int i = 0; i < count && place[p] >= 0; ++i)
        expected[(c * plane + place[p]) * kernels.lanes + i] = data[element(images, i, c, first_pixel + p)];
  return equal(window, expected);
}

bool check_fill_window(const Kernels& kernels) {
  bool good = true;
  for (bool channels_last : {false, true})
    for (int count : {1, kernels.lanes - 1, kernels.lanes})
      for (int64_t first_pixel : {0, 3})
        for (bool ascending : {false, true})
          good &= check_fill_window(kernels, channels_last, count, first_pixel, ascending);
  return good;
}

bool check_store_sums(const Kernels& kernels, const Images& shape, int32_t step, bool with_affine, bool with_residual) {
  const int64_t plane = shape.pixels + 3, size = shape.count * shape.image_size;
  const std::vector<float> data = numbers((shape.channels + 2) * plane * kernels.lanes);
  std::vector<int32_t> plane_of(shape.channels);
  for (size_t k = 0; k < plane_of.size(); ++k) plane_of[k] = static_cast<int32_t>(k + (k > 1 ? 2 : 0));
  // The second run ends with the last pixel and the last vector of a plane.
  const auto count = static_cast<int32_t>((shape.pixels + step - 1) / step), half = count / 2;
  const auto tail = static_cast<int32_t>(plane - (count - half - 1));
  const std::array<Run, 2> runs{Run{1, 0, half}, Run{tail, (half + 1) * step, count - half - 1}};
  const Sums sums{data.data(), plane_of.data(), plane, runs.data(), std::ssize(runs), step};
  const std::vector<float> scale = numbers(shape.channels), bias = numbers(shape.channels), residual = numbers(size);
  const Epilogue epilogue{with_affine ? scale.data() : nullptr, with_affine ? bias.data() : nullptr,
                          with_residual ? residual.data() : nullptr, with_residual};
  std::vector<float> output(size, kUntouched);
  kernels.store_sums(sums, epilogue, shape, output.data());

  std::vector<double> expected(size, kUntouched);
  for (int i = 0; i < shape.count; ++i)
    for (int64_t k = 0; k < shape.channels; ++k)
      for (const Run& run : runs)
        for (int32_t p = 0; p < run.count; ++p) {
          const int64_t at = element(shape, i, k, run.to + p * step);
          double value = data[(plane_of[k] * plane + run.from + p) * kernels.lanes + i];
          if (with_affine) value = value * scale[k] + bias[k];
          if (with_residual) value = std::max(value + residual[at], 0.0);
          expected[at] = value;
        }
  return equal(output, expected);
}

bool check_store_sums(const Kernels& kernels) {
  bool good = true;
  for (bool channels_last : {false, true})
    for (int count : {1, kernels.lanes - 1, kernels.lanes})
      for (int32_t step : {1, 2, 3})
        for (bool with_affine : {false, true})
          for (bool with_residual : {false, true})
            good &= check_store_sums(kernels,
                                     describe(nullptr, kernels.lanes + 3, 6 * kernels.lanes + 1, channels_last, count),
                                     step, with_affine, with_residual);
  return good;
}

// Lists with up to 4 * lanes entries each, the second one empty, and a window that the entry with the largest offset
// reads to its end.
struct TileCase {
  static constexpr int64_t kVectors = 3, kSegments = 2;
  int64_t lanes, vector, row_pitch, reach, channels = kVectors * vector;
  std::vector<int32_t> rows{0}, offsets;
  std::vector<float> values, window;

  TileCase(const Kernels& kernels, int64_t vector_, int cols)
      : lanes(kernels.lanes),
        vector(vector_),
        row_pitch((cols + 3) * lanes),
        reach((kTilePixels / cols - 1) * row_pitch + cols * lanes) {
    const int64_t largest = 5 * row_pitch;
    for (int64_t i = 0; i < kVectors * kSegments; ++i) {
      for (int64_t entries = i == 1 ? 0 : below(4 * lanes); entries > 0; --entries)
        offsets.push_back(static_cast<int32_t>(below(largest)));
      rows.push_back(static_cast<int32_t>(offsets.size()));
    }
    offsets.back() = static_cast<int32_t>(largest);
    values = numbers(std::ssize(offsets) * vector);
    window = numbers(largest + reach);
  }
  OffsetLists lists() const { return {vector, kVectors, kSegments, rows.data(), offsets.data(), values.data()}; }
  float source(int32_t entry, int64_t at, int cols) const {
    return window[offsets[entry] + at / (cols * lanes) * row_pitch + at % (cols * lanes)];
  }
};

bool check_conv_tile(const Kernels& kernels) {
  bool good = true;
  for (int64_t vector : {1, 2, 4})
    for (int cols : {16, 8, 4}) {
      const TileCase tile(kernels, vector, cols);
      const int64_t lanes = kernels.lanes, row_pitch = (cols + 1) * lanes, plane = kTilePixels / cols * row_pitch;
      std::vector<float> sums((tile.channels - 1) * plane + plane - lanes, kUntouched);
      kernels.conv_tile(tile.lists(), {cols, tile.window.data(), tile.row_pitch, sums.data(), row_pitch, plane});

      std::vector<double> expected(sums.size(), kUntouched);
      for (int64_t k = 0; k < tile.channels; ++k)
        for (int64_t at = 0; at < kTilePixels * lanes; ++at) {
          double sum = 0;
          for (int64_t segment = 0; segment < TileCase::kSegments; ++segment) {
            const int64_t list = segment * TileCase::kVectors + k / vector;
            for (int32_t i = tile.rows[list]; i < tile.rows[list + 1]; ++i)
              sum += static_cast<double>(tile.values[i * vector + k % vector]) * tile.source(i, at, cols);
          }
          expected[k * plane + at / (cols * lanes) * row_pitch + at % (cols * lanes)] = sum;
        }
      good &= equal(sums, expected);
    }
  return good;
}

bool check_grad_weight_tile(const Kernels& kernels) {
  bool good = true;
  for (int64_t vector : {1, 2, 4})
    for (int cols : {16, 8, 4}) {
      const TileCase tile(kernels, vector, cols);
      const int64_t lanes = kernels.lanes, row_pitch = (cols + 1) * lanes, plane = kTilePixels / cols * row_pitch;
      const int64_t entries = std::ssize(tile.offsets);
      std::vector<int32_t> channel_of(tile.channels);
      for (int64_t k = 0; k < tile.channels; ++k) channel_of[k] = static_cast<int32_t>(tile.channels - 1 - k);
      const std::vector<float> grad = numbers((tile.channels - 1) * plane + plane - lanes);
      std::vector<float> totals = numbers(vector * entries);
      std::vector<double> expected(totals.begin(), totals.end());
      kernels.grad_weight_tile(
          tile.lists(), {tile.window.data(), grad.data(), tile.row_pitch, row_pitch, plane, cols, channel_of.data()},
          totals.data());

      for (int64_t list = 0; list < TileCase::kVectors * TileCase::kSegments; ++list)
        for (int32_t i = tile.rows[list]; i < tile.rows[list + 1]; ++i)
          for (int64_t j = 0; j < vector; ++j) {
            const int32_t k = channel_of[list % TileCase::kVectors * vector + j];
            for (int64_t at = 0; at < kTilePixels * lanes; ++at)
              expected[j * entries + i] +=
                  static_cast<double>(grad[k * plane + at / (cols * lanes) * row_pitch + at % (cols * lanes)]) *
                  tile.source(i, at, cols);
          }
      good &= equal(totals, expected);
    }
  return good;
}

bool check_entries(const Kernels& kernels) {
  const int64_t channels = 7, taps = 9, count = 37, plane = 100;
  std::vector<int32_t> tap_offset(taps), entries(count), offsets(count);
  for (int64_t tap = 0; tap < taps; ++tap) tap_offset[tap] = static_cast<int32_t>(10 * tap);
  for (int32_t& entry : entries) entry = static_cast<int32_t>(below(channels) << kTapBits | below(taps));
  kernels.entry_offsets(entries.data(), count, plane, tap_offset.data(), offsets.data());
  bool good = kernels.entries_inside(entries.data(), count, channels, taps);
  for (int64_t i = 0; i < count; ++i)
    good &= offsets[i] == (entries[i] >> kTapBits) * plane + 10 * (entries[i] & (kMaxTaps - 1));
  for (int64_t outside : {channels << kTapBits, taps, int64_t{-1}})
    for (int64_t at : {int64_t{0}, count - 1}) {
      std::vector<int32_t> wrong = entries;
      wrong[at] = static_cast<int32_t>(outside);
      good &= !kernels.entries_inside(wrong.data(), count, channels, taps);
    }
  return good;
}

template <class T>
double norm_of(const std::vector<T>& a, const std::vector<T>& b, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += std::pow(static_cast<double>(a[i]) - b[i], 2);
  return std::sqrt(sum);
}

template <class T>
bool check_pgd_step(const ElementKernels<T>& kernels) {
  bool good = true;
  const StepSizes sizes{0.25, 0.375, -0.5, 0.75};
  for (int64_t count : {1, 15, 35}) {
    const int64_t samples = 3, size = samples * count;
    const std::vector<T> adv = numbers<T>(size), grad = numbers<T>(size), clean = numbers<T>(size), zero(size);
    std::vector<T> linf(size, kUntouched), l2 = adv;  // in place
    std::vector<double> expected_linf(size), expected_l2(size);
    kernels.step_linf(adv.data(), grad.data(), clean.data(), linf.data(), size, sizes);
    kernels.step_l2(l2.data(), grad.data(), clean.data(), l2.data(), samples, count, sizes);
    for (int64_t begin = 0; begin < size; begin += count) {
      const double length = norm_of(grad, zero, begin, begin + count);
      double distance = 0;
      for (int64_t i = begin; i < begin + count; ++i) {
        const double moved = adv[i] + (grad[i] > 0 ? 1 : -1) * sizes.alpha;
        expected_linf[i] =
            std::clamp(std::clamp(moved, clean[i] - sizes.eps, clean[i] + sizes.eps), sizes.lo, sizes.hi);
        expected_l2[i] = adv[i] + sizes.alpha * grad[i] / length - clean[i];
        distance += expected_l2[i] * expected_l2[i];
      }
      const double shrink = std::min(1.0, sizes.eps / std::sqrt(distance));
      for (int64_t i = begin; i < begin + count; ++i)
        expected_l2[i] = std::clamp(clean[i] + shrink * expected_l2[i], sizes.lo, sizes.hi);
    }
    good &= equal(linf, expected_linf) && equal(l2, expected_l2);
  }
  return good;
}

// Word `place` of the Philox4x32-10 block `counter` of a stream.
uint32_t philox(uint64_t counter, uint32_t stream, uint64_t key, int64_t place) {
  std::array<uint32_t, 4> x{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream, 0};
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
  }
  return x[place];
}

template <class T>
bool check_random_start(const ElementKernels<T>& kernels) {
  const Noise noise{0x0123456789abcdef, (uint64_t{1} << 32) - 2, 0.5, -0.9, 0.9};  // the counter's carry included
  const int64_t count = 37, samples = 3, size = count * samples, skipped = 5;
  const std::vector<T> clean = numbers<T>(size);
  std::vector<T> linf(size, kUntouched), l2(size, kUntouched);
  kernels.start_linf(clean.data(), linf.data(), skipped, size, noise);
  for (int64_t sample = 0; sample < samples; ++sample) kernels.start_l2(clean.data(), l2.data(), sample, count, noise);

  const auto unit = [&](int64_t i, uint32_t stream) {
    return (philox(i / 4 + noise.offset, stream, noise.key, i % 4) + 1.0) / 4294967296.0;
  };
  std::vector<double> expected_linf(size, kUntouched), expected_l2(size);
  for (int64_t i = skipped; i < size; ++i) {
    const double fraction = (philox(i / 4 + noise.offset, 0, noise.key, i % 4) >> 8) / 8388608.0 - 1;
    expected_linf[i] = std::clamp(clean[i] + noise.eps * fraction, noise.lo, noise.hi);
  }
  for (int64_t sample = 0; sample < samples; ++sample) {
    double sum = 0;
    for (int64_t i = sample * count; i < (sample + 1) * count; ++i) {
      const double angle = 2 * std::acos(-1.0) * unit(i | 1, 0);
      expected_l2[i] = std::sqrt(-2 * std::log(unit(i & ~1, 0))) * (i % 2 ? std::sin(angle) : std::cos(angle));
      sum += expected_l2[i] * expected_l2[i];
    }
    const double radius = noise.eps * std::pow(unit(sample, 1), 1.0 / count);
    for (int64_t i = sample * count; i < (sample + 1) * count; ++i)
      expected_l2[i] = std::clamp(clean[i] + radius / std::sqrt(sum) * expected_l2[i], noise.lo, noise.hi);
  }
  return equal(linf, expected_linf) && equal(l2, expected_l2);
}

bool check_all(const Kernels& kernels) {
  const std::pair<const char*, bool> results[] = {
      {"fill_window", check_fill_window(kernels)},
      {"store_sums", check_store_sums(kernels)},
      {"masked_conv2d", check_conv_tile(kernels)},
      {"masked_conv2d_grad_weight", check_grad_weight_tile(kernels)},
      {"entries", check_entries(kernels)},
      {"pgd_step", check_pgd_step(kernels.of_float) && check_pgd_step(kernels.of_double)},
      {"random_start", check_random_start(kernels.of_float) && check_random_start(kernels.of_double)},
  };
  for (const auto& [name, good] : results) std::printf("%-8s  %-25s  %s\n", kernels.isa, name, good ? "ok" : "WRONG");
  return std::ranges::all_of(results, [](const auto& result) { return result.second; });
}

}  // namespace

int main() {
  bool good = check_all(KERNELS(portable));
#if defined(SPARSE_ADV_X86)
  if (cpu_capability() >= Capability::avx2) good &= check_all(KERNELS(avx2));
  if (cpu_capability() >= Capability::avx512) good &= check_all(KERNELS(avx512));
#endif
  return good ? 0 : 1;
}
