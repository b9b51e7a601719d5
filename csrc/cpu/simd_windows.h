// Windows of 8 x 1 pixels, 4 apart, as vectors of 4 pixels of each, and the transposition of such fours.
#pragma once

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

constexpr int kFours = kLanes / 4;

// Bits s of a window say which of its pixels are read; the others are 0.
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

// The pixels 0 to 3 and 4 to 7 of kFours windows anywhere.
static inline __attribute__((always_inline)) void load_windows(const float* const p[kFours],
                                                               const uint32_t bits[kFours], Vec& first, Vec& last) {
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

// Transposes 4 x 4 floats in each four of four vectors.
static inline __attribute__((always_inline)) void transpose_fours(Vec v[4]) {
#if defined(__AVX512F__)
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
#elif defined(__AVX2__)
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
  const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
  const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
  v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
#else
  transpose(v);
#endif
}

// Stores four i of a vector at to[i].
static inline __attribute__((always_inline)) void store_fours(Vec v, float* const to[kFours]) {
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
