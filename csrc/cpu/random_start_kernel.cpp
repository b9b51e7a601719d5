#include "cpu/random_start_kernel.h"

#include "common/philox.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

namespace {

constexpr int kBlocks = 16;         // Philox blocks that are computed together
constexpr int kBits = 4 * kBlocks;  // words of these blocks

// bits[i] is the word of element i.
void draw(uint64_t counter, PhiloxStream stream, uint64_t key, uint32_t (&bits)[kBits]) {
  const PhiloxBlocks<kBlocks> blocks = philox<kBlocks>(counter, stream, key);
  for (int block = 0; block < kBlocks; ++block)
    for (int word = 0; word < 4; ++word) bits[4 * block + word] = blocks.word[word][block];
}

// Calls visit(i, bits, index of i in bits) for begin <= i < end.
template <class Visit>
void for_each_element(int64_t begin, int64_t end, const Noise& noise, Visit visit) {
  uint32_t bits[kBits];
  for (int64_t group = begin / kBits; group * kBits < end; ++group) {
    const int64_t first = group * kBits;
    draw(noise.offset + static_cast<uint64_t>(first / 4), PhiloxStream::elements, noise.key, bits);
    const int64_t from = first < begin ? begin : first, to = first + kBits > end ? end : first + kBits;
    for (int64_t i = from; i < to; ++i) visit(i, bits, static_cast<int>(i - first));
  }
}

struct NormalPair {
  double even, odd;
};

// Box-Muller on two neighbouring words: the cosine for the even element, the sine for the odd one.
NormalPair normal_pair(const uint32_t* bits) {
  const double radius = __builtin_sqrt(-2.0 * __builtin_log(unit(bits[0])));
  const double angle = 6.283185307179586 * unit(bits[1]);
  return {radius * __builtin_cos(angle), radius * __builtin_sin(angle)};
}

template <class T>
T clamped(double x, const Noise& noise) {
  const T value = static_cast<T>(x), lo = static_cast<T>(noise.lo), hi = static_cast<T>(noise.hi);
  return value < lo ? lo : value > hi ? hi : value;
}

}  // namespace

// For float, the product of eps and a 24-bit fraction is exact in double: the result is the same with and without FMA,
// and rounding cannot lead out of [clean - eps, clean + eps].
template <class T>
void random_start_linf(const T* clean, T* out, int64_t begin, int64_t end, const Noise& noise) {
  const double eps = static_cast<T>(noise.eps);
  for_each_element(begin, end, noise, [&](int64_t i, const uint32_t* bits, int index) {
    out[i] = clamped<T>(clean[i] + eps * fraction(bits[index]), noise);
  });
}

// Uniform in the ball: a uniform direction (a normalised Gaussian vector) times a radius whose density is proportional
// to radius^(count - 1).
template <class T>
void random_start_l2(const T* clean, T* out, int64_t sample, int64_t count, const Noise& noise) {
  const int64_t begin = sample * count, end = begin + count;
  double sum = 0;
  NormalPair pair{};
  for_each_element(begin, end, noise, [&](int64_t i, const uint32_t* bits, int index) {
    const bool is_odd = index % 2 == 1;
    if (!is_odd || i == begin) pair = normal_pair(bits + index - is_odd);
    const double value = is_odd ? pair.odd : pair.even;
    sum += value * value;
    out[i] = static_cast<T>(value);
  });
  uint32_t bits[kBits];
  draw(noise.offset + static_cast<uint64_t>(sample / 4), PhiloxStream::radii, noise.key, bits);
  const double radius = noise.eps * __builtin_pow(unit(bits[sample % 4]), 1.0 / static_cast<double>(count));
  const double scale = sum > 0 ? radius / __builtin_sqrt(sum) : 0.0;
  for (int64_t i = begin; i < end; ++i) out[i] = clamped<T>(clean[i] + scale * out[i], noise);
}

template void random_start_linf(const float*, float*, int64_t, int64_t, const Noise&);
template void random_start_linf(const double*, double*, int64_t, int64_t, const Noise&);
template void random_start_l2(const float*, float*, int64_t, int64_t, const Noise&);
template void random_start_l2(const double*, double*, int64_t, int64_t, const Noise&);

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
