// A vector of float lanes in the instruction set that the including kernel file is compiled for. Lane = sample: the
// kernels compute kLanes images at once, each at the same pixel.
//
// Everything lives in the instruction set's own namespace, and kernel files use no inline function of another library:
// the linker keeps one copy of each inline function, and that might be the AVX-512 one on a machine that has none.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Keeps the compiler from folding a pointer's index into every load: with an index register, a load and its
// multiply-add are two micro-operations instead of one.
static inline const float* in_register(const float* p) {
  asm("" : "+r"(p));
  return p;
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kAccumulators = 16;  // of the 32 registers, so that loads, broadcasts and partial sums find room
using Vec = __m512;

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
// max(v, 0) that keeps NaN: vmaxps returns its second operand where one is NaN.
static inline Vec relu(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
static inline Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
static inline void store_first(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }

static inline void transpose(Vec r[16]) {
  Vec t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Lane i = the sum of the lanes of v[i].
static inline Vec sum_of_each(const Vec v[16]) {
  Vec a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kAccumulators = 8;  // of 16 registers
using Vec = __m256;

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec relu(Vec v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
static inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec load_first(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
static inline void store_first(float* p, Vec v, int count) { _mm256_maskstore_ps(p, first(count), v); }

static inline void transpose(Vec r[8]) {
  Vec t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec low = r[i], high = r[4 + i];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

static inline Vec sum_of_each(const Vec v[8]) {
  Vec a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    a[i] = add(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = add(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  return add(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
}

#else

constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
typedef float Vec __attribute__((vector_size(16)));

static inline Vec load(const float* p) { return Vec{p[0], p[1], p[2], p[3]}; }
static inline void store(float* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v[i];
}
static inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec relu(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = v[i] <= 0.0f ? 0.0f : v[i];
  return v;
}
static inline Vec load_first(const float* p, int count) {
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
static inline void store_first(float* p, Vec v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
static inline void transpose(Vec r[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
}
static inline Vec sum_of_each(const Vec v[4]) {
  Vec sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
  return sums;
}

#endif

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
