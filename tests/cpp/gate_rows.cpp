#include "cpu/masked_conv2d/gate_rows.h"

#include "cpp/kernels_check.h"

namespace sparse_adv {

static bool check_gate_rows(int64_t row_size, int64_t row_count) {
  const int64_t row_bytes = (row_size + 7) / 8;
  const auto byte = [](int64_t bit) { return bit / 8; };
  const auto at = [](int64_t bit) { return static_cast<uint8_t>(1 << bit % 8); };
  std::vector<uint8_t> noisy(row_count * row_bytes), rows(noisy.size());
  std::vector<uint8_t> bits((row_count * row_size + 7) / 8), bits_of_noisy(bits.size()), rows_of_bits(rows.size());
  for (uint8_t& each : noisy) each = static_cast<uint8_t>(below(256));
  for (int64_t row = 0; row < row_count; ++row)
    for (int64_t i = 0; i < row_size; ++i) {
      if (!(noisy[row * row_bytes + byte(i)] & at(i))) continue;
      rows[row * row_bytes + byte(i)] |= at(i);
      bits[byte(row * row_size + i)] |= at(row * row_size + i);
    }
  remove_padding(noisy.data(), row_size, row_count, bits_of_noisy.data());  // whatever the padding is
  add_padding(bits.data(), row_size, row_count, rows_of_bits.data());       // with 0
  return bits_of_noisy == bits && rows_of_bits == rows;
}

bool check_gate_rows() {
  bool good = true;
  for (int64_t row_size = 1; row_size <= 100; ++row_size)
    for (int64_t row_count : {0, 1, 2, 7, 18}) good &= check_gate_rows(row_size, row_count);
  return good;
}

}  // namespace sparse_adv
