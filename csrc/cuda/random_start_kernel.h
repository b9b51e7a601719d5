// Counter-based noise, the same numbers as on the CPU (cpu/random_start_kernel.h): element i of a batch in NCHW order
// gets word i % 4 of the Philox4x32-10 block with counter i / 4 + offset. clean and out are contiguous.
#pragma once

#include <cmath>

#include "cuda/vectors.h"

namespace sparse_adv {

template <class Image>
struct RandomStart {
  const Image* clean;
  Image* out;
  double eps, lo, hi;
};

enum class Stream : uint32_t { elements, radii };  // the third counter word: streams never share a block

struct PhiloxBlock {
  uint32_t word[4];
};

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
SPARSE_ADV_DEVICE PhiloxBlock philox(uint64_t counter, Stream stream, uint64_t key) {
  uint32_t word[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                      static_cast<uint32_t>(stream), 0};
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * word[2];
    word[0] = static_cast<uint32_t>(product1 >> 32) ^ word[1] ^ key0;
    word[1] = static_cast<uint32_t>(product1);
    word[2] = static_cast<uint32_t>(product0 >> 32) ^ word[3] ^ key1;
    word[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{word[0], word[1], word[2], word[3]}};
}

// Uniform in (0, 1]: 0 is excluded because its logarithm is taken.
SPARSE_ADV_DEVICE double unit(uint32_t bits) { return (static_cast<double>(bits) + 1.0) * 0x1p-32; }

// Philox block `block` of the batch: elements [4 block, 4 block + 4), as many of them as exist. For float, the product
// of eps and a 24-bit fraction is exact in double, so the result is that of the CPU, with and without FMA. `V` is 4
// where the addresses are aligned, else 1.
template <int V, class Image>
SPARSE_ADV_DEVICE void random_start_linf_thread(const RandomStart<Image>& start, int64_t count, int64_t block,
                                                uint64_t key, uint64_t offset) {
  using T = Compute<Image>;
  const double eps = static_cast<double>(static_cast<T>(start.eps));
  const T lo = static_cast<T>(start.lo), hi = static_cast<T>(start.hi);
  const PhiloxBlock bits = philox(offset + static_cast<uint64_t>(block), Stream::elements, key);
  const auto moved = [&](Image clean, uint32_t word) {
    const double fraction = static_cast<double>(static_cast<int32_t>(word >> 8)) * 0x1p-23 - 1.0;
    return static_cast<Image>(clamped(static_cast<T>(static_cast<double>(clean) + eps * fraction), lo, hi));
  };
  const int64_t first = 4 * block;
  if (V == 4 && first + 4 <= count) {
    Vector<Image, 4> images;
    images.load(start.clean + first);
    for (int i = 0; i < 4; ++i) images.at[i] = moved(images.at[i], bits.word[i]);
    images.store(start.out + first);
  } else {
    for (int i = 0; i < 4 && first + i < count; ++i) start.out[first + i] = moved(start.clean[first + i], bits.word[i]);
  }
}

// Box-Muller on two neighbouring words: the cosine for the even element, the sine for the odd one.
SPARSE_ADV_DEVICE void normal_pair(uint32_t bits0, uint32_t bits1, double& even, double& odd) {
  const double radius = sqrt(-2.0 * log(unit(bits0))), angle = 6.283185307179586 * unit(bits1);
  even = radius * cos(angle);
  odd = radius * sin(angle);
}

// One of the `threads` threads of image `sample` of `count` elements. Its normal numbers are drawn twice, once for
// their norm and once for the move: drawing takes less time than storing them would.
template <class Image>
struct StartThread {
  using T = Compute<Image>;

  const RandomStart<Image>& start;
  int64_t sample, count;
  int thread, threads;
  uint64_t key, offset;

  SPARSE_ADV_DEVICE double sum_of_squares() const {
    double sum = 0;
    for_each_normal([&](int64_t, double normal) { sum += normal * normal; });
    return sum;
  }

  // The image's normalised Gaussian vector times a radius whose density is proportional to radius^(count - 1).
  SPARSE_ADV_DEVICE void move(double sum_of_squares) const {
    const PhiloxBlock bits = philox(offset + static_cast<uint64_t>(sample / 4), Stream::radii, key);
    const double radius = start.eps * pow(unit(bits.word[sample % 4]), 1.0 / static_cast<double>(count));
    const double scale = sum_of_squares > 0 ? radius / sqrt(sum_of_squares) : 0.0;
    for_each_normal([&](int64_t i, double normal) {
      const T value = static_cast<T>(normal);  // rounded before it is scaled, as on the CPU
      const T moved = static_cast<T>(static_cast<double>(start.clean[i]) + scale * static_cast<double>(value));
      start.out[i] = static_cast<Image>(clamped(moved, static_cast<T>(start.lo), static_cast<T>(start.hi)));
    });
  }

 private:
  // Calls visit(i, normal number of element i); a Philox block may belong to two images.
  template <class Visit>
  SPARSE_ADV_DEVICE void for_each_normal(Visit visit) const {
    const int64_t begin = sample * count, end = begin + count;
    for (int64_t block = begin / 4 + thread; 4 * block < end; block += threads) {
      const PhiloxBlock bits = philox(offset + static_cast<uint64_t>(block), Stream::elements, key);
      double normal[4];
      normal_pair(bits.word[0], bits.word[1], normal[0], normal[1]);
      normal_pair(bits.word[2], bits.word[3], normal[2], normal[3]);
      for (int i = 0; i < 4; ++i)
        if (4 * block + i >= begin && 4 * block + i < end) visit(4 * block + i, normal[i]);
    }
  }
};

}  // namespace sparse_adv
