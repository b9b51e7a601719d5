// The elementwise kernels: PGD step, random start, the pointwise epilogue, BatchNorm and max pooling.
#include <array>

#include "cpp/kernels_check.h"

namespace sparse_adv {

template <class T>
static double norm_of(const std::vector<T>& a, const std::vector<T>& b, int64_t begin, int64_t end) {
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
    std::vector<T> linf(size, kUntouched), l2 = adv;  // l2 runs in place
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

// Word `word` of the Philox4x32-10 block `counter` of a stream.
static uint32_t philox(uint64_t counter, uint32_t stream, uint64_t key, int64_t word) {
  std::array<uint32_t, 4> x{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream, 0};
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
  }
  return x[word];
}

template <class T>
bool check_random_start(const ElementKernels<T>& kernels) {
  // The counter carries into its second word.
  const Noise noise{.key = 0x0123456789abcdef, .offset = (uint64_t{1} << 32) - 2, .eps = 0.5, .lo = -0.9, .hi = 0.9};
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

// The first run is skipped; the output is the residual.
template <class T>
static bool check_pointwise(const ElementKernels<T>& kernels, Activation activation, bool channels_last, int64_t rows,
                            int64_t row_size) {
  const int64_t channels = channels_last ? row_size : 3, images = 2;
  const int64_t run_size = rows * row_size, runs = images * (channels_last ? 5 : channels), size = runs * run_size;
  const std::vector<T> input = numbers<T>(size), residual = numbers<T>(size), scale = numbers<T>(channels),
                       bias = numbers<T>(channels);
  std::vector<T> out = residual;
  std::fill_n(out.begin(), run_size, static_cast<T>(kUntouched));
  Gates gates(activation, size, row_size, size / images);
  Pointwise<T> operands{
      .input = input.data(),
      .out = out.data(),
      .epilogue = {.scale = scale.data(), .bias = bias.data(), .residual = out.data()},
      .runs = {.channels = channels, .channels_last = channels_last, .rows = rows, .row_size = row_size}};
  gates.activate(operands.epilogue);
  kernels.pointwise(operands, 1, runs);

  operands.epilogue.residual = residual.data();
  std::vector<double> expected(size, kUntouched);
  for (int64_t at = run_size; at < size; ++at)
    expected[at] =
        with_epilogue(operands.epilogue, input[at], channels_last ? at % channels : at / run_size % channels, at);
  return equal(out, expected) && gates.fit(out);
}

template <class T>
bool check_pointwise(const ElementKernels<T>& kernels) {
  bool good = true;
  for (Activation activation : kActivations)
    for (int64_t row_size : {1, 4, 7, 14, 16, 33, 63, 70}) {
      good &= check_pointwise(kernels, activation, true, 1, row_size);
      for (int64_t rows : {1, 2, 13}) good &= check_pointwise(kernels, activation, false, rows, row_size);
    }
  return good;
}

// The first channel, or the first and the last two pixels, are left out of the sums, and the first run of the gradient.
template <class T>
static bool check_batch_norm_act(const ElementKernels<T>& kernels, bool gated, bool channels_last, int64_t rows,
                                 int64_t row_size) {
  const int64_t channels = channels_last ? row_size : 5, images = 3, pixels = channels_last ? 300 : rows * row_size;
  const int64_t size = images * channels * pixels, first_channel = channels_last ? 0 : 1;
  const std::vector<T> input = numbers<T>(size), grad = numbers<T>(size), vectors = numbers<T>(4 * channels);
  const T *const shift = vectors.data(), *const scale = shift + channels, *const slope = scale + channels,
                 *const offset = slope + channels;
  Gates gates(gated ? Activation::gate : Activation::none, size, row_size, size / images);
  Epilogue<T> gate;
  gates.activate(gate);
  BatchNormSums<T> sums{
      .runs = {.channels = channels, .channels_last = channels_last, .rows = rows, .row_size = row_size},
      .input = input.data(),
      .minus_shift = shift,
      .gate = gate.gate};
  const auto channel_of = [&](int64_t at) { return channels_last ? at % channels : at / pixels % channels; };
  const int64_t begin = 1, end = images * pixels - 2;  // pixels, if channels_last
  bool good = true;
  for (const T* gradient : {static_cast<const T*>(nullptr), grad.data()}) {
    sums.grad = gradient;
    std::vector<double> first(channels, kUntouched), second(channels, kUntouched);
    std::vector<T> scratch(2 * channels, kUntouched);
    if (channels_last)
      kernels.pixel_sums(sums, begin, end, scratch.data(), first.data(), second.data());
    else
      kernels.channel_sums(sums, images, first_channel, channels, first.data(), second.data());
    std::vector<double> expected_first(channels, kUntouched), expected_second(channels, kUntouched);
    std::fill(expected_first.begin() + first_channel, expected_first.end(), 0.0);
    std::fill(expected_second.begin() + first_channel, expected_second.end(), 0.0);
    for (int64_t at = 0; at < size; ++at) {
      if (channels_last && (at / channels < begin || at / channels >= end)) continue;
      const int64_t c = channel_of(at);
      const double d = static_cast<double>(input[at]) + shift[c];
      const double g = gradient ? with_epilogue(gate, gradient[at], c, at) : d;
      expected_first[c] += g;
      expected_second[c] += g * d;
    }
    for (int64_t c = 0; c < channels; ++c)  // `equal` is for sums below 1
      for (double* sum : {&first[c], &second[c], &expected_first[c], &expected_second[c]})
        *sum /= static_cast<double>(images * pixels);
    good &= equal(std::vector<T>(first.begin(), first.end()), expected_first) &&
            equal(std::vector<T>(second.begin(), second.end()), expected_second);
  }
  const int64_t run_size = rows * row_size;
  std::vector<T> grad_input(size, kUntouched), grad_residual(size, kUntouched);
  kernels.norm_grad_input({.operands = sums,
                           .scale = scale,
                           .slope = slope,
                           .offset = offset,
                           .grad_input = grad_input.data(),
                           .grad_residual = gated ? grad_residual.data() : nullptr},
                          1, size / run_size);
  std::vector<double> expected(size, kUntouched), expected_residual(size, kUntouched);
  for (int64_t at = run_size; at < size; ++at) {
    const int64_t c = channel_of(at);
    const double g = with_epilogue(gate, grad[at], c, at);
    expected[at] = g * scale[c] + (static_cast<double>(input[at]) + shift[c]) * slope[c] + offset[c];
    if (gated) expected_residual[at] = g;
  }
  return good && equal(grad_input, expected) && equal(grad_residual, expected_residual);
}

template <class T>
bool check_batch_norm_act(const ElementKernels<T>& kernels) {
  bool good = true;
  for (bool gated : {false, true})
    for (int64_t row_size : {1, 4, 7, 14, 16, 33, 63, 70}) {
      good &= check_batch_norm_act(kernels, gated, true, 1, row_size);
      for (int64_t rows : {1, 2, 13}) good &= check_batch_norm_act(kernels, gated, false, rows, row_size);
    }
  return good;
}

// One row of windows; the input ends with the last element that they cover.
template <class T>
static bool check_max_pool2d(const ElementKernels<T>& kernels, int64_t windows, int64_t rows, int64_t cols,
                             int64_t step) {
  const int64_t pooled = windows * step, pitch = pooled * cols + 3, size = (rows - 1) * pitch + pooled * cols;
  const PoolRow row{.windows = windows, .rows = rows, .cols = cols, .row_pitch = pitch, .step = step};
  const std::vector<T> input = numbers<T>(size), grad = numbers<T>(pooled), residual = numbers<T>(size);
  std::vector<double> expected(pooled), expected_grad(size, kUntouched), expected_sum(size, kUntouched);
  std::vector<uint8_t> numbers_of_largest(pooled);
  for (int64_t i = 0; i < pooled; ++i) {
    const int64_t first = i / step * cols * step + i % step;
    int64_t largest = 0;
    const auto at = [&](int64_t number) { return first + number / cols * pitch + number % cols * step; };
    for (int64_t number = 1; number < rows * cols; ++number)
      if (input[at(number)] > input[at(largest)]) largest = number;
    expected[i] = input[at(largest)];
    numbers_of_largest[i] = static_cast<uint8_t>(largest);
    for (int64_t number = 0; number < rows * cols; ++number) {
      expected_grad[at(number)] = number == largest ? grad[i] : 0;
      expected_sum[at(number)] = expected_grad[at(number)] + residual[at(number)];
    }
  }
  std::vector<T> out(pooled, kUntouched), without_index(pooled, kUntouched), grad_input(size, kUntouched),
      sum = residual;
  std::vector<uint8_t> index(pooled, kUntouchedByte);
  kernels.pool_row(row, input.data(), out.data(), index.data());
  kernels.pool_row(row, input.data(), without_index.data(), nullptr);
  kernels.pool_grad_row(row, grad.data(), index.data(), nullptr, grad_input.data());
  kernels.pool_grad_row(row, grad.data(), index.data(), sum.data(), sum.data());
  for (int64_t i = 0; i < size; ++i)
    if (std::isnan(expected_sum[i])) expected_sum[i] = residual[i];
  return equal(out, expected) && equal(without_index, expected) && index == numbers_of_largest &&
         equal(grad_input, expected_grad) && equal(sum, expected_sum);
}

template <class T>
bool check_max_pool2d(const ElementKernels<T>& kernels) {
  bool good = true;
  for (int64_t windows : {1, 2, 7, 8, 16, 37})
    for (int64_t size : {1, 2, 3})
      for (int64_t step : {1, 5, 33}) good &= check_max_pool2d(kernels, windows, size, size == 3 ? 2 : size, step);
  return good;
}

template bool check_max_pool2d(const ElementKernels<float>& kernels);
template bool check_max_pool2d(const ElementKernels<double>& kernels);
template bool check_batch_norm_act(const ElementKernels<float>& kernels);
template bool check_batch_norm_act(const ElementKernels<double>& kernels);
template bool check_pgd_step(const ElementKernels<float>& kernels);
template bool check_pgd_step(const ElementKernels<double>& kernels);
template bool check_pointwise(const ElementKernels<float>& kernels);
template bool check_pointwise(const ElementKernels<double>& kernels);
template bool check_random_start(const ElementKernels<float>& kernels);
template bool check_random_start(const ElementKernels<double>& kernels);

}  // namespace sparse_adv
