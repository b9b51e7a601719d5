#include "cpu/random_start_kernel.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

namespace {

constexpr int kLanes = 16;         // Philox blocks computed together, one per lane
constexpr int kBits = 4 * kLanes;  // words of these blocks

enum Stream : uint32_t { kElements, kRadii };  // the third counter word: streams never share a block

struct Philox {
  uint32_t word[4][kLanes];
};

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), for kLanes consecutive
// counters. bits[i] is the word of element i.
void draw(uint64_t counter, Stream stream, uint64_t key, uint32_t (&bits)[kBits]) {
  Philox x;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t position = counter + lane;
    x.word[0][lane] = static_cast<uint32_t>(position);
    x.word[1][lane] = static_cast<uint32_t>(position >> 32);
    x.word[2][lane] = stream;
    x.word[3][lane] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t product0 = uint64_t{0xD2511F53} * x.word[0][lane];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * x.word[2][lane];
      x.word[0][lane] = static_cast<uint32_t>(product1 >> 32) ^ x.word[1][lane] ^ key0;
      x.word[1][lane] = static_cast<uint32_t>(product1);
      x.word[2][lane] = static_cast<uint32_t>(product0 >> 32) ^ x.word[3][lane] ^ key1;
      x.word[3][lane] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int word = 0; word < 4; ++word) bits[4 * lane + word] = x.word[word][lane];
}

// Calls visit(i, bits, index of i in bits) for begin <= i < end.
template <class Visit>
void for_each_element(int64_t begin, int64_t end, const Noise& noise, Visit visit) {
  uint32_t bits[kBits];
  for (int64_t group = begin / kBits; group * kBits < end; ++group) {
    const int64_t first = group * kBits;
    draw(noise.offset + static_cast<uint64_t>(first / 4), kElements, noise.key, bits);
    const int64_t from = first < begin ? begin : first, to = first + kBits > end ? end : first + kBits;
    for (int64_t i = from; i < to; ++i) visit(i, bits, static_cast<int>(i - first));
  }
}

// Uniform in (0, 1]: 0 is excluded because its logarithm is taken.
double unit(uint32_t bits) { return (static_cast<double>(bits) + 1.0) * 0x1p-32; }

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
    const double fraction = static_cast<double>(static_cast<int32_t>(bits[index] >> 8)) * 0x1p-23 - 1.0;
    out[i] = clamped<T>(clean[i] + eps * fraction, noise);
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
  draw(noise.offset + static_cast<uint64_t>(sample / 4), kRadii, noise.key, bits);
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
