#include "cpu/pointwise_kernel.h"

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

// How the gate of a run is read and written along with it, in strips of whole rows. `column` counts from the start of a
// strip.
//
// Strips of one row.
template <class T>
struct WideRows : BitsInRow<Lanes<T>::count> {
  static constexpr int64_t strip_rows = 1;
  const int64_t row_bytes;

  WideRows(const Pointwise<T>& operands, int64_t first_run)
      : BitsInRow<Lanes<T>::count>{.row_start = first_run * operands.rows * ((operands.row_size + 7) / 8), .column = 0},
        row_bytes((operands.row_size + 7) / 8) {}

  void start_strip(const Epilogue<T>&, int64_t) {}
  void end_strip(const Epilogue<T>&, int64_t) { this->row_start += row_bytes; }
};

// Strips of as many rows as fit 64 bits, which stay in a register: a row of 4, 7 or 14 pixels does not fill a vector.
template <class T>
struct NarrowRows {
  const int64_t row_size, row_bytes, strip_rows;
  int64_t row_start, column = 0;
  uint64_t bits = 0;

  NarrowRows(const Pointwise<T>& operands, int64_t first_run)
      : row_size(operands.row_size),
        row_bytes((row_size + 7) / 8),
        strip_rows(64 / row_size),
        row_start(first_run * operands.rows * row_bytes) {}

  void start_strip(const Epilogue<T>& epilogue, int64_t rows) {
    bits = epilogue.gate ? gather_rows(epilogue.gate + row_start, rows, row_size, row_bytes) : 0;
  }
  void end_strip(const Epilogue<T>& epilogue, int64_t rows) {
    if (epilogue.relu_gate) scatter_rows(epilogue.relu_gate + row_start, rows, row_size, row_bytes, bits);
    row_start += rows * row_bytes;
  }
  uint32_t load(const uint8_t*, int) const { return static_cast<uint32_t>(bits >> column); }
  void store(uint8_t*, uint32_t passing, int count) {
    bits |= static_cast<uint64_t>(passing & first_bits(count)) << column;
  }
};

template <bool CHANNELS_LAST, class Bits, class T>
static void runs(const Pointwise<T>& operands, int64_t begin, int64_t end) {
  constexpr int lanes = Lanes<T>::count;
  const Epilogue<T> epilogue = operands.epilogue;  // a copy can stay in registers, whatever is stored
  const T* const input = operands.input;
  T* const out = operands.out;
  const int64_t rows = operands.rows, row_size = operands.row_size;
  const bool affine = epilogue.scale || epilogue.bias;
  auto scale = broadcast(T(1)), bias = broadcast(T(0));
  int64_t channel = begin % operands.channels, at = begin * rows * row_size;
  Bits bits(operands, begin);
  const auto write = [&](int64_t column, int count) __attribute__((always_inline)) {
    if (CHANNELS_LAST && epilogue.scale) scale = load_up_to(epilogue.scale + column, count);
    if (CHANNELS_LAST && epilogue.bias) bias = load_up_to(epilogue.bias + column, count);
    auto v = load_up_to(input + at + column, count);
    if (affine) v = fma(v, scale, bias);
    bits.column = column;
    store_up_to(out + at + column, finish(v, epilogue, at + column, count, bits), count);
  };
  for (int64_t run = begin; run < end; ++run) {
    if (!CHANNELS_LAST) {
      if (epilogue.scale) scale = broadcast(epilogue.scale[channel]);
      if (epilogue.bias) bias = broadcast(epilogue.bias[channel]);
      if (++channel == operands.channels) channel = 0;
    }
    for (int64_t row = 0; row < rows; row += bits.strip_rows) {
      const int64_t strip_rows = rows - row < bits.strip_rows ? rows - row : bits.strip_rows;
      const int64_t size = strip_rows * row_size;
      bits.start_strip(epilogue, strip_rows);
      int64_t column = 0;
      for (; column + lanes <= size; column += lanes) write(column, lanes);
      if (column < size) write(column, static_cast<int>(size - column));
      bits.end_strip(epilogue, strip_rows);
      at += size;
    }
  }
}

template <class T>
void pointwise(const Pointwise<T>& operands, int64_t begin, int64_t end) {
  if (operands.channels_last) return runs<true, WideRows<T>>(operands, begin, end);
  if (operands.rows > 1 && operands.row_size < 64) return runs<false, NarrowRows<T>>(operands, begin, end);
  return runs<false, WideRows<T>>(operands, begin, end);
}

template void pointwise(const Pointwise<float>&, int64_t, int64_t);
template void pointwise(const Pointwise<double>&, int64_t, int64_t);

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
