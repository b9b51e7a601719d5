// The part of an epilogue that follows scale and bias, on vectors: residual, ReLU or gate.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// A double is a vector of one lane.
static inline double load(const double* p) { return *p; }
static inline void store(double* p, double v) { *p = v; }
static inline double load_first(const double* p, int) { return *p; }
static inline void store_first(double* p, double v, int) { *p = v; }
static inline double broadcast(double x) { return x; }
static inline double fma(double a, double b, double c) { return a * b + c; }
static inline double add(double a, double b) { return a + b; }
static inline double relu(double v) { return v <= 0 ? 0 : v; }
static inline uint32_t passing_bits(double v) { return v <= 0 ? 0 : 1; }
static inline double zero_unless(uint32_t bits, double v) { return bits & 1 ? v : 0; }

static inline uint32_t first_bits(int count) { return (uint32_t{1} << count) - 1; }

// `count` bits, at most 16, that begin at bit `shift` of the byte at p.
static inline uint32_t load_bits(const uint8_t* p, int shift, int count) {
  uint32_t bits = 0;
  for (int i = 0; 8 * i < shift + count; ++i) bits |= static_cast<uint32_t>(p[i]) << 8 * i;
  return bits >> shift;
}

// Rows are written from left to right: the bits before `shift` have been written, those behind the last one become 0.
static inline void store_bits(uint8_t* p, int shift, uint32_t bits, int count) {
  bits = (bits & first_bits(count)) << shift;
  if (shift > 0) bits |= *p;
  for (int i = 0; 8 * i < shift + count; ++i) p[i] = static_cast<uint8_t>(bits >> 8 * i);
}

// The bits of a vector that lies within one row and begins at a multiple of kLanes.
struct BitsOfRow {
  int64_t row_start;  // byte of the gate
  int64_t column;

  static constexpr bool kWholeBytes = kLanes % 8 == 0;

  uint32_t load(const uint8_t* gate, int count) const {
    return load_bits(gate + row_start + (column >> 3), kWholeBytes ? 0 : column & 7, count);
  }
  void store(uint8_t* gate, uint32_t bits, int count) const {
    store_bits(gate + row_start + (column >> 3), kWholeBytes ? 0 : column & 7, bits, count);
  }
};

// The bits of a vector that may begin anywhere in a row and continue in the next rows.
struct BitsAcrossRows {
  int64_t row_start;  // byte of the gate
  int64_t column, row_size, row_bytes;

  // Calls visit(byte, shift, bits before, bits) for the part of each row.
  template <class Visit>
  void for_each_row(int count, Visit visit) const {
    int64_t start = row_start, from = column;
    for (int done = 0; done < count; start += row_bytes, from = 0) {
      const int64_t left = row_size - from;
      const int part = count - done < left ? count - done : static_cast<int>(left);
      visit(start + (from >> 3), static_cast<int>(from & 7), done, part);
      done += part;
    }
  }
  uint32_t load(const uint8_t* gate, int count) const {
    uint32_t bits = 0;
    for_each_row(count, [&](int64_t byte, int shift, int done, int part) {
      bits |= (load_bits(gate + byte, shift, part) & first_bits(part)) << done;
    });
    return bits;
  }
  void store(uint8_t* gate, uint32_t bits, int count) const {
    for_each_row(count, [&](int64_t byte, int shift, int done, int part) {
      store_bits(gate + byte, shift, bits >> done, part);
    });
  }
  void advance(int count) {
    column += count;
    for (; column >= row_size; column -= row_size) row_start += row_bytes;
  }
};

// The result for the `count` elements of the output that begin at `at`; `bits` is where a gate has theirs.
template <class T, class Values, class Bits>
static inline __attribute__((always_inline)) Values finish(Values v, const Epilogue<T>& epilogue, int64_t at, int count,
                                                           const Bits& bits) {
  if (epilogue.residual) v = add(v, load_first(epilogue.residual + at, count));
  if (epilogue.gate) v = zero_unless(bits.load(epilogue.gate, count), v);
  if (epilogue.relu) {
    if (epilogue.relu_gate) bits.store(epilogue.relu_gate, passing_bits(v), count);
    v = relu(v);
  }
  return v;
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
