// A vector of floats (`kLanes` lanes) in the instruction set that the including kernel file is compiled for.
//
// Everything is in the namespace of the instruction set, and kernel files call no inline function of another library:
// the linker keeps one copy of an inline function, which might be the AVX-512 one on a machine without AVX-512. Methods
// of their operands are always inlined for that reason; .ci/sanitize looks for others.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Forces a pointer into one register. Otherwise the compiler may use an index register in every load, and then a load
// and its multiply-add are two micro-operations instead of one (4 to 8 % of the time of all passes). Forces a vector
// into a register: otherwise GCC loads it again for each use (blocks of 2 x 2 at density 0.2: 17.2 instead of 12.4 ms).
static inline const float* in_register(const float* p) {
  asm("" : "+r"(p));
  return p;
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kAccumulators = 16;  // of 32 registers; the others are for loads, broadcasts and partial sums
using Vec = __m512;

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec in_register(Vec v) {
  asm("" : "+v"(v));
  return v;
}
static inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
// max(v, 0); NaN stays NaN, because vmaxps returns its second operand if one of them is NaN.
static inline Vec relu(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
// Bit i: whether a ReLU passes the gradient of lane i, which is not (v <= 0), so that NaN passes it, as in PyTorch.
static inline uint32_t passing_bits(Vec v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
static inline Vec zero_unless(uint32_t bits, Vec v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }
static inline Vec select(uint32_t bits, Vec a, Vec b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
}
// Bit i: whether lane i of v is larger than that of b, or NaN.
static inline uint32_t larger_bits(Vec v, Vec b) {
  return _mm512_cmp_ps_mask(v, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
}
// Bit i: whether byte i is `value`.
static inline uint32_t equal_bits(const uint8_t* p, uint8_t value) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)))));
}
// The lanes of even and of odd number of the sequence a, b. The reverse: lanes of a and b in turn, from their first and
// from their second halves.
static inline Vec deinterleave_even(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}
static inline Vec deinterleave_odd(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}
static inline Vec interleave_low(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
static inline Vec interleave_high(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
// The vectors that begin one float before and after `v`; `v` is at p, aligned, and has a vector before and after it.
// Shifting in registers is faster here than a load that crosses a cache line. With shorter vectors only some loads
// cross a line, and loading is faster (on AVX2 shifting had 0.8 times the speed of loading).
static inline Vec one_before(const float*, Vec before, Vec v) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(v), _mm512_castps_si512(before), 15));
}
static inline Vec one_after(const float*, Vec v, Vec after) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(after), _mm512_castps_si512(v), 1));
}
static inline __mmask16 tail_mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
static inline Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(tail_mask(count), p); }
static inline void store_first(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, tail_mask(count), v); }

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

// Horizontal sums of kLanes vectors in three steps: pairs, pairs of pairs, and all kLanes / 4 of these. Lane i of the
// result is the sum of the lanes of vector i.
static inline Vec add_pair(Vec a, Vec b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
static inline Vec add_pairs(Vec a, Vec b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
static inline Vec add_quads(const Vec v[4]) {
  const Vec a = add(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
  const Vec b = add(_mm512_shuffle_f32x4(v[2], v[3], 0x88), _mm512_shuffle_f32x4(v[2], v[3], 0xdd));
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kAccumulators = 8;  // of 16 registers
using Vec = __m256;

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec in_register(Vec v) {
  asm("" : "+x"(v));
  return v;
}
static inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec relu(Vec v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
static inline uint32_t passing_bits(Vec v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
}
static inline Vec zero_unless(uint32_t bits, Vec v) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i selected = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(selected, lane)), v);
}
static inline Vec select(uint32_t bits, Vec a, Vec b) {
  return _mm256_or_ps(zero_unless(bits, a), zero_unless(~bits, b));
}
static inline uint32_t larger_bits(Vec v, Vec b) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v, b, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q))));
}
static inline uint32_t equal_bits(const uint8_t* p, uint8_t value) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)))) &
                               0xff);
}
// After a shuffle within 128-bit halves: the lanes of a first, then those of b.
static inline Vec deinterleaved(Vec v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }
static inline Vec deinterleave_even(Vec a, Vec b) { return deinterleaved(_mm256_shuffle_ps(a, b, 0x88)); }
static inline Vec deinterleave_odd(Vec a, Vec b) { return deinterleaved(_mm256_shuffle_ps(a, b, 0xdd)); }
static inline Vec interleave_low(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
static inline Vec interleave_high(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
static inline Vec one_before(const float* p, Vec, Vec) { return load(p - 1); }
static inline Vec one_after(const float* p, Vec, Vec) { return load(p + 1); }
static inline __m256i tail_mask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec load_first(const float* p, int count) { return _mm256_maskload_ps(p, tail_mask(count)); }
static inline void store_first(float* p, Vec v, int count) { _mm256_maskstore_ps(p, tail_mask(count), v); }

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

static inline Vec add_pair(Vec a, Vec b) { return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
static inline Vec add_pairs(Vec a, Vec b) { return add(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee)); }
static inline Vec add_quads(const Vec v[2]) {
  return add(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31));
}

#else

constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
typedef float Vec __attribute__((vector_size(16)));

static inline Vec load(const float* p) { return Vec{p[0], p[1], p[2], p[3]}; }
static inline void store(float* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v[i];
}
static inline Vec in_register(Vec v) { return v; }
static inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec relu(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // -0 stays -0, as in PyTorch
  return v;
}
static inline uint32_t passing_bits(Vec v) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(v[i] <= 0.0f)) << i;
  return bits;
}
static inline Vec zero_unless(uint32_t bits, Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = bits >> i & 1 ? v[i] : 0.0f;
  return v;
}
static inline Vec select(uint32_t bits, Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) b[i] = bits >> i & 1 ? a[i] : b[i];
  return b;
}
static inline uint32_t larger_bits(Vec v, Vec b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(v[i] > b[i] || v[i] != v[i]) << i;
  return bits;
}
static inline uint32_t equal_bits(const uint8_t* p, uint8_t value) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(p[i] == value) << i;
  return bits;
}
static inline Vec deinterleave_even(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
static inline Vec deinterleave_odd(Vec a, Vec b) { return Vec{a[1], a[3], b[1], b[3]}; }
static inline Vec interleave_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
static inline Vec interleave_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
static inline Vec one_before(const float* p, Vec, Vec) { return load(p - 1); }
static inline Vec one_after(const float* p, Vec, Vec) { return load(p + 1); }
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
static inline Vec add_pair(Vec a, Vec b) { return Vec{a[0] + a[2], b[0] + b[2], a[1] + a[3], b[1] + b[3]}; }
static inline Vec add_pairs(Vec a, Vec b) { return Vec{a[0] + a[2], a[1] + a[3], b[0] + b[2], b[1] + b[3]}; }
static inline Vec add_quads(const Vec v[1]) { return v[0]; }

#endif

constexpr int kLineFloats = 64 / sizeof(float);  // of a cache line

static inline void prefetch(const float* p, int64_t size) {
  for (int64_t i = 0; i < size; i += kLineFloats) __builtin_prefetch(p + i);
}
static inline void prefetch_to_write(float* p, int64_t size) {
  for (int64_t i = 0; i < size; i += kLineFloats) __builtin_prefetch(p + i, 1);
}

static inline Vec load_up_to(const float* p, int count) { return count == kLanes ? load(p) : load_first(p, count); }
static inline void store_up_to(float* p, Vec v, int count) {
  if (count == kLanes)
    store(p, v);
  else
    store_first(p, v, count);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
