// Loads and stores of four neighbouring floats from and to each of kQuads places, and their transposition.
#pragma once

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

constexpr int kQuads = kLanes / 4;

// The floats at p whose bits are set; the others are 0 and not read.
#if defined(__AVX512F__)
static inline Vec load_where(const float* p, uint32_t bits) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
}
#elif defined(__AVX2__)
static inline Vec load_where(const float* p, uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i selected = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_maskload_ps(p, _mm256_cmpeq_epi32(selected, lane));
}
#else
static inline Vec load_where(const float* p, uint32_t bits) {
  Vec v{};
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) v[i] = p[i];
  return v;
}
#endif

// The pixels 0 to 3 and 4 to 7 of kQuads windows, wherever they are; bit s of a window is that of its pixel s.
static inline __attribute__((always_inline)) void load_windows(const float* const p[kQuads],
                                                               const uint32_t bits[kQuads], Vec& first, Vec& last) {
#if defined(__AVX512F__)
  const auto pair = [&](int i) {
    const __m512 low = _mm512_zextps256_ps512(_mm256_maskz_loadu_ps(static_cast<__mmask8>(bits[i]), p[i]));
    return _mm512_mask_loadu_ps(low, static_cast<__mmask16>(bits[i + 1] << 8), p[i + 1] - 8);
  };
  const __m512 a = pair(0), b = pair(2);
  first = _mm512_shuffle_f32x4(a, b, 0x88);
  last = _mm512_shuffle_f32x4(a, b, 0xdd);
#elif defined(__AVX2__)
  const __m256 a = load_where(p[0], bits[0]), b = load_where(p[1], bits[1]);
  first = _mm256_permute2f128_ps(a, b, 0x20);
  last = _mm256_permute2f128_ps(a, b, 0x31);
#else
  first = load_where(p[0], bits[0]);
  last = load_where(p[0] + 4, bits[0] >> 4);
#endif
}

// Lanes of a and b in turn, from the first or the last half of each 128 bits, as single floats or as pairs.
#if defined(__AVX512F__)
static inline Vec interleave_first(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
static inline Vec interleave_last(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
static inline Vec interleave_first_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
static inline Vec interleave_last_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
#elif defined(__AVX2__)
static inline Vec interleave_first(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
static inline Vec interleave_last(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
static inline Vec interleave_first_pairs(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0x44); }
static inline Vec interleave_last_pairs(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0xee); }
#endif

// Transposes 4 x 4 floats in each 128 bits of four vectors.
static inline __attribute__((always_inline)) void transpose_fours(Vec v[4]) {
#if defined(__AVX2__)
  const Vec a = interleave_first(v[0], v[1]), b = interleave_last(v[0], v[1]), c = interleave_first(v[2], v[3]),
            d = interleave_last(v[2], v[3]);
  v[0] = interleave_first_pairs(a, c);
  v[1] = interleave_last_pairs(a, c);
  v[2] = interleave_first_pairs(b, d);
  v[3] = interleave_last_pairs(b, d);
#else
  transpose(v);
#endif
}

// Stores the lanes 4 i to 4 i + 3 at to[i].
static inline __attribute__((always_inline)) void store_quads(Vec v, float* const to[kQuads]) {
#if defined(__AVX512F__)
  _mm_storeu_ps(to[0], _mm512_castps512_ps128(v));
  _mm_storeu_ps(to[1], _mm512_extractf32x4_ps(v, 1));
  _mm_storeu_ps(to[2], _mm512_extractf32x4_ps(v, 2));
  _mm_storeu_ps(to[3], _mm512_extractf32x4_ps(v, 3));
#elif defined(__AVX2__)
  _mm_storeu_ps(to[0], _mm256_castps256_ps128(v));
  _mm_storeu_ps(to[1], _mm256_extractf128_ps(v, 1));
#else
  store(to[0], v);
#endif
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
