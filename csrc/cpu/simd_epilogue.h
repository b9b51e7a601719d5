// The part of an epilogue that follows scale and bias, on vectors: residual, ReLU or gate.
#pragma once

#include <cstring>

#include "cpu/epilogue.h"
#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// A double is a vector of one lane.
static inline double load_up_to(const double* p, int) { return *p; }
static inline void store_up_to(double* p, double v, int) { *p = v; }
static inline double broadcast(double x) { return x; }
static inline double fma(double a, double b, double c) { return a * b + c; }
static inline double add(double a, double b) { return a + b; }
static inline double relu(double v) { return v < 0 ? 0 : v; }
static inline uint32_t passing_bits(double v) { return v <= 0 ? 0 : 1; }
static inline double zero_unless(uint32_t bits, double v) { return bits & 1 ? v : 0; }

// Whether the epilogue leaves sums as they are.
template <class T>
static inline bool is_identity(const Epilogue<T>& epilogue) {
  return !epilogue.scale && !epilogue.bias && !epilogue.residual && !epilogue.relu && !epilogue.gate;
}

static inline uint32_t first_bits(int count) { return (uint32_t{1} << count) - 1; }

// `count` bits, at most 16, that begin at bit `shift` of the byte at p.
static inline uint32_t load_bits(const uint8_t* p, int shift, int count) {
  if (shift + count == 16) return (p[0] | static_cast<uint32_t>(p[1]) << 8) >> shift;
  uint32_t bits = 0;
  for (int i = 0; 8 * i < shift + count; ++i) bits |= static_cast<uint32_t>(p[i]) << 8 * i;
  return bits >> shift;
}

// Rows are written from left to right: the bits before `shift` have been written, those after the last one become 0.
static inline void store_bits(uint8_t* p, int shift, uint32_t bits, int count) {
  bits = (bits & first_bits(count)) << shift;
  if (shift > 0) bits |= *p;
  if (shift + count == 16) {
    p[0] = static_cast<uint8_t>(bits);
    p[1] = static_cast<uint8_t>(bits >> 8);
  } else {
    for (int i = 0; 8 * i < shift + count; ++i) p[i] = static_cast<uint8_t>(bits >> 8 * i);
  }
}

// The bits of 4 rows of 4 elements, the images of a ResNet's last layers, without a loop.
static inline uint64_t gather_4_of_4(const uint8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, 4);
  bytes &= 0x0f0f0f0f;
  bytes = (bytes | bytes >> 4) & 0x00ff00ff;
  return (bytes | bytes >> 8) & 0xffff;
}

static inline void scatter_4_of_4(uint8_t* p, uint64_t bits) {
  uint32_t bytes = static_cast<uint32_t>(bits) & 0xffff;
  bytes = (bytes | bytes << 8) & 0x00ff00ff;
  bytes = (bytes | bytes << 4) & 0x0f0f0f0f;
  std::memcpy(p, &bytes, 4);
}

// The bits of `rows` rows, at most 64 in all, one row after the other and without the padding of their last bytes.
static inline uint64_t gather_rows(const uint8_t* p, int64_t rows, int64_t row_size, int64_t row_bytes) {
  if (rows == 4 && row_size == 4) return gather_4_of_4(p);
  uint64_t bits = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < row_bytes; ++i) {
      const uint64_t byte = *p++ & (i + 1 == row_bytes ? 0xff >> (8 * row_bytes - row_size) : 0xff);
      bits |= byte << (row * row_size + 8 * i);
    }
  return bits;
}

static inline void scatter_rows(uint8_t* p, int64_t rows, int64_t row_size, int64_t row_bytes, uint64_t bits) {
  if (rows == 4 && row_size == 4) return scatter_4_of_4(p, bits);
  const uint64_t row_mask = (uint64_t{1} << row_size) - 1;
  for (int64_t row = 0; row < rows; ++row, bits >>= row_size)
    for (int64_t i = 0; i < row_bytes; ++i) *p++ = static_cast<uint8_t>((bits & row_mask) >> 8 * i);
}

// The bits of a vector that lies within one row and begins at a multiple of LANES: one or two bytes, without a loop,
// because the convolution has this inlined for each vector of a tile.
template <int LANES>
struct BitsInRow {
  int64_t row_start;  // byte of the gate
  int64_t column;

  uint32_t load(const uint8_t* gate, int count) const {
    const uint8_t* p = gate + row_start + (column >> 3);
    uint32_t bits = p[0];
    if (LANES > 8 && count > 8) bits |= static_cast<uint32_t>(p[1]) << 8;
    return bits >> shift();
  }
  void store(uint8_t* gate, uint32_t bits, int count) const {
    uint8_t* p = gate + row_start + (column >> 3);
    bits = (bits & first_bits(count)) << shift();
    if (shift() > 0) bits |= p[0];
    p[0] = static_cast<uint8_t>(bits);
    if (LANES > 8 && count > 8) p[1] = static_cast<uint8_t>(bits >> 8);
  }
  int shift() const { return LANES % 8 == 0 ? 0 : static_cast<int>(column & 7); }
};

// The bits of a vector of pixels of one channel that may begin anywhere in a row and continue in the next rows.
struct BitsAcrossRows {
  int64_t row_start;  // byte of the gate
  int64_t column, row_size, row_bytes;
  int rows_of_vector;  // if all vectors begin and end with a row, else 0

  // `element` is counted from the start of an image. Rows of whole bytes count as one row per channel.
  BitsAcrossRows(const GateLayout& layout, int64_t element, int64_t pixels)
      : row_size(layout.row_size % 8 == 0 ? pixels : layout.row_size),
        row_bytes(layout.row_size % 8 == 0 ? pixels / 8 : layout.row_bytes),
        rows_of_vector(kLanes % row_size == 0 ? kLanes / static_cast<int>(row_size) : 0) {
    row_start = element / row_size * row_bytes;
    column = element % row_size;
  }

  uint32_t load(const uint8_t* gate, int count) const {
    if (count == kLanes && rows_of_vector > 0)
      return static_cast<uint32_t>(gather_rows(gate + row_start, rows_of_vector, row_size, row_bytes));
    uint32_t bits = 0;
    for_each_row(count, [&](int64_t byte, int shift, int done, int part) {
      bits |= (load_bits(gate + byte, shift, part) & first_bits(part)) << done;
    });
    return bits;
  }
  void store(uint8_t* gate, uint32_t bits, int count) const {
    if (count == kLanes && rows_of_vector > 0)
      return scatter_rows(gate + row_start, rows_of_vector, row_size, row_bytes, bits);
    for_each_row(count, [&](int64_t byte, int shift, int done, int part) {
      store_bits(gate + byte, shift, bits >> done, part);
    });
  }
  void advance(int count) {
    column += count;
    for (; column >= row_size; column -= row_size) row_start += row_bytes;
  }

 private:
  // Calls visit(byte of the gate, shift, bits before this part, bits of this part) for each row.
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
};

// The result for the `count` elements of the output that begin at `at`; `bits` says where a gate has their bits.
template <class T, class Values, class Bits>
static inline __attribute__((always_inline)) Values finish(Values v, const Epilogue<T>& epilogue, int64_t at, int count,
                                                           Bits& bits) {
  if (epilogue.residual) v = add(v, load_up_to(epilogue.residual + at, count));
  if (epilogue.gate) v = zero_unless(bits.load(epilogue.gate, count), v);
  if (epilogue.relu) {
    if (epilogue.gate_out) bits.store(epilogue.gate_out, passing_bits(v), count);
    v = relu(v);
  }
  return v;
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
