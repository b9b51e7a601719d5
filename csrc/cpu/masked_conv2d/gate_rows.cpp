#include "cpu/masked_conv2d/gate_rows.h"

#include <algorithm>

namespace sparse_adv {

namespace {

constexpr int64_t kWord = 32;  // bits that are moved at once

uint64_t load_bytes(const uint8_t* p, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(p[i]) << 8 * i;
  return word;
}

void store_bytes(uint8_t* p, uint64_t word, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(word >> 8 * i);
}

uint64_t first_bits(uint64_t word, int64_t count) { return word & ((uint64_t{1} << count) - 1); }

}  // namespace

void remove_padding(const uint8_t* rows, int64_t row_size, int64_t row_count, uint8_t* bits) {
  uint64_t pending = 0;  // bits that are not stored yet, less than a word
  int64_t count = 0;
  for (int64_t row = 0; row < row_count; ++row)
    for (int64_t done = 0; done < row_size; done += kWord) {
      const int64_t part = std::min(row_size - done, kWord), bytes = (part + 7) / 8;
      pending |= first_bits(load_bytes(rows, bytes), part) << count;
      rows += bytes;
      count += part;
      if (count < kWord) continue;
      store_bytes(bits, pending, kWord / 8);
      bits += kWord / 8;
      pending >>= kWord;
      count -= kWord;
    }
  store_bytes(bits, pending, (count + 7) / 8);
}

void add_padding(const uint8_t* bits, int64_t row_size, int64_t row_count, uint8_t* rows) {
  uint64_t pending = 0;  // bits that are loaded and not stored yet
  int64_t count = 0, left = row_size * row_count;
  for (int64_t row = 0; row < row_count; ++row)
    for (int64_t done = 0; done < row_size; done += kWord) {
      const int64_t part = std::min(row_size - done, kWord), bytes = (part + 7) / 8;
      if (count < part) {
        const int64_t loaded = std::min(left, kWord);
        pending |= load_bytes(bits, (loaded + 7) / 8) << count;
        bits += kWord / 8;
        count += loaded;
        left -= loaded;
      }
      store_bytes(rows, first_bits(pending, part), bytes);
      rows += bytes;
      pending >>= part;
      count -= part;
    }
}

}  // namespace sparse_adv
