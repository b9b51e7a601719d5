// Visits runs (runs.h) vector by vector, along with the bits of their gates.
#pragma once

#include <cstring>

#include "cpu/runs.h"
#include "cpu/simd_epilogue.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = kLanes;
};
template <>
struct Lanes<double> {
  static constexpr int count = 1;
};

// The gates of runs that are read and written; null if there is none.
struct GatePointers {
  const uint8_t* read = nullptr;
  uint8_t* write = nullptr;
};

// How the gate of a run is read and written along with it, in strips of whole rows. `column` counts from the start of a
// strip.
//
// Strips of one row.
template <class T>
struct WideRows : BitsInRow<Lanes<T>::count> {
  static constexpr int64_t strip_rows = 1;
  const int64_t row_bytes;

  WideRows(const Runs& runs, int64_t first_run)
      : BitsInRow<Lanes<T>::count>{.row_start = first_run * runs.rows * ((runs.row_size + 7) / 8), .column = 0},
        row_bytes((runs.row_size + 7) / 8) {}

  void start_strip(const GatePointers&, int64_t) {}
  void end_strip(const GatePointers&, int64_t) { this->row_start += row_bytes; }
};

// The bits of 8 rows of one element, which are a byte each: a product moves all of them at once.
static inline uint64_t gather_8_single(const uint8_t* p) {
  uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  return (bytes & 0x0101010101010101) * 0x0102040810204080 >> 56;
}

static inline void scatter_8_single(uint8_t* p, uint64_t bits) {
  const uint64_t each = ((bits & 0xff) * 0x0101010101010101) & 0x8040201008040201;
  const uint64_t bytes = (each + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
  std::memcpy(p, &bytes, 8);
}

// Strips of as many rows as fit 64 bits, which stay in a register: a row of 4, 7 or 14 pixels does not fill a vector.
template <class T>
struct NarrowRows {
  const int64_t row_size, row_bytes, strip_rows;
  int64_t row_start, column = 0;
  uint64_t bits = 0;

  NarrowRows(const Runs& runs, int64_t first_run)
      : row_size(runs.row_size),
        row_bytes((row_size + 7) / 8),
        strip_rows(64 / row_size),
        row_start(first_run * runs.rows * row_bytes) {}

  void start_strip(const GatePointers& gates, int64_t rows) {
    bits = gates.read ? gather(gates.read + row_start, rows) : 0;
  }
  void end_strip(const GatePointers& gates, int64_t rows) {
    if (gates.write) scatter(gates.write + row_start, rows);
    row_start += rows * row_bytes;
  }
  uint32_t load(const uint8_t*, int) const { return static_cast<uint32_t>(bits >> column); }
  void store(uint8_t*, uint32_t passing, int count) {
    bits |= static_cast<uint64_t>(passing & first_bits(count)) << column;
  }

 private:
  uint64_t gather(const uint8_t* p, int64_t rows) const {
    if (row_size > 1 || rows < 64) return gather_rows(p, rows, row_size, row_bytes);
    uint64_t all = 0;
    for (int i = 0; i < 64; i += 8) all |= gather_8_single(p + i) << i;
    return all;
  }
  void scatter(uint8_t* p, int64_t rows) const {
    if (row_size > 1 || rows < 64) return scatter_rows(p, rows, row_size, row_bytes, bits);
    for (int i = 0; i < 64; i += 8) scatter_8_single(p + i, bits >> i);
  }
};

// Calls start_run(channel) and end_run(channel), with 0 if channels_last, around the vectors of each run from `begin`
// to `end` - 1, and visit(at, column, count, bits) for each vector of `count` elements: `at` is its first element, and
// `column` the channel of that if channels_last.
template <class T, class Bits, class StartRun, class Visit, class EndRun>
static inline __attribute__((always_inline)) void visit_runs(const Runs& shape, const GatePointers& gates,
                                                             int64_t begin, int64_t end, StartRun start_run,
                                                             Visit visit, EndRun end_run) {
  constexpr int lanes = Lanes<T>::count;
  const Runs runs = shape;  // a copy can stay in registers, whatever is stored
  int64_t channel = runs.channels_last ? 0 : begin % runs.channels, at = begin * runs.rows * runs.row_size;
  Bits bits(runs, begin);
  int64_t run_start = at;
  const auto vector = [&](int64_t column, int count) __attribute__((always_inline)) {
    bits.column = column;
    visit(at + column, at + column - run_start, count, bits);
  };
  for (int64_t run = begin; run < end; ++run) {
    start_run(channel);
    run_start = at;
    for (int64_t row = 0; row < runs.rows; row += bits.strip_rows) {
      const int64_t strip_rows = runs.rows - row < bits.strip_rows ? runs.rows - row : bits.strip_rows;
      const int64_t size = strip_rows * runs.row_size;
      bits.start_strip(gates, strip_rows);
      int64_t column = 0;
      for (; column + lanes <= size; column += lanes) vector(column, lanes);
      if (column < size) vector(column, static_cast<int>(size - column));
      bits.end_strip(gates, strip_rows);
      at += size;
    }
    end_run(channel);
    if (!runs.channels_last && ++channel == runs.channels) channel = 0;
  }
}

// Whether the gate of runs is read in strips of several rows.
static inline bool has_narrow_rows(const Runs& runs) { return runs.rows > 1 && runs.row_size < 64; }

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
