// Counter-based noise, the same numbers as on the CPU (cpu/random_start_kernel.h): element i of a batch in NCHW order
// gets word i % 4 of the Philox4x32-10 block with counter i / 4 + offset. clean and out are contiguous.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "cuda/vectors.h"

namespace sparse_adv {

template <class Image>
struct RandomStart {
  const Image* clean;
  Image* out;
  double eps, lo, hi;
};

// Philox block `block` of the batch: elements [4 block, 4 block + 4), as many of them as exist. For float, the product
// of eps and a 24-bit fraction is exact in double, so the result is that of the CPU, with and without FMA. `V` is 4
// where the addresses are aligned, else 1.
template <int V, class Image>
SPARSE_ADV_DEVICE void random_start_linf_thread(const RandomStart<Image>& start, int64_t count, int64_t block,
                                                uint64_t key, uint64_t offset) {
  using T = Compute<Image>;
  const double eps = static_cast<double>(static_cast<T>(start.eps));
  const T lo = static_cast<T>(start.lo), hi = static_cast<T>(start.hi);
  const PhiloxBlocks<1> bits = philox<1>(offset + static_cast<uint64_t>(block), PhiloxStream::elements, key);
  const auto moved = [&](Image clean, uint32_t word) {
    return static_cast<Image>(clamped(static_cast<T>(static_cast<double>(clean) + eps * fraction(word)), lo, hi));
  };
  const int64_t first = 4 * block;
  if (V == 4 && first + 4 <= count) {
    Vector<Image, 4> images;
    images.load(start.clean + first);
    for (int i = 0; i < 4; ++i) images.at[i] = moved(images.at[i], bits.word[i][0]);
    images.store(start.out + first);
  } else {
    for (int i = 0; i < 4 && first + i < count; ++i)
      start.out[first + i] = moved(start.clean[first + i], bits.word[i][0]);
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
    const PhiloxBlocks<1> bits = philox<1>(offset + static_cast<uint64_t>(sample / 4), PhiloxStream::radii, key);
    const double radius = start.eps * pow(unit(bits.word[sample % 4][0]), 1.0 / static_cast<double>(count));
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
      const PhiloxBlocks<1> bits = philox<1>(offset + static_cast<uint64_t>(block), PhiloxStream::elements, key);
      double normal[4];
      normal_pair(bits.word[0][0], bits.word[1][0], normal[0], normal[1]);
      normal_pair(bits.word[2][0], bits.word[3][0], normal[2], normal[3]);
      for (int i = 0; i < 4; ++i)
        if (4 * block + i >= begin && 4 * block + i < end) visit(4 * block + i, normal[i]);
    }
  }
};

}  // namespace sparse_adv
