// The rows of a gate with and without the padding of their last bytes (GateLayout in epilogue.h).
#pragma once

#include <cstdint>

namespace sparse_adv {

// `bits` has the rows one after the other, in (row_size * row_count + 7) / 8 bytes.
void remove_padding(const uint8_t* rows, int64_t row_size, int64_t row_count, uint8_t* bits);
void add_padding(const uint8_t* bits, int64_t row_size, int64_t row_count, uint8_t* rows);

}  // namespace sparse_adv
