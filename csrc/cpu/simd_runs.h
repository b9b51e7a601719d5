// Visits runs (runs.h) vector by vector, along with the bits of their gates.
#pragma once

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
    bits = gates.read ? gather_rows(gates.read + row_start, rows, row_size, row_bytes) : 0;
  }
  void end_strip(const GatePointers& gates, int64_t rows) {
    if (gates.write) scatter_rows(gates.write + row_start, rows, row_size, row_bytes, bits);
    row_start += rows * row_bytes;
  }
  uint32_t load(const uint8_t*, int) const { return static_cast<uint32_t>(bits >> column); }
  void store(uint8_t*, uint32_t passing, int count) {
    bits |= static_cast<uint64_t>(passing & first_bits(count)) << column;
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
  const auto vector = [&](int64_t column, int count) __attribute__((always_inline)) {
    bits.column = column;
    visit(at + column, column, count, bits);
  };
  for (int64_t run = begin; run < end; ++run) {
    start_run(channel);
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

// Whether the gate of NCHW runs is read in strips of several rows.
static inline bool has_narrow_rows(const Runs& runs) { return runs.rows > 1 && runs.row_size < 64; }

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
