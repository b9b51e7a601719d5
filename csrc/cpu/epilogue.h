// The operations on a sum before a kernel stores it, and the gate of a ReLU: one bit per element, true where the ReLU
// passes the gradient.
#pragma once

#include <cstdint>

namespace sparse_adv {

// Where a gate has the bit of an element. The rows of the tensor's innermost memory dimension are padded to whole
// bytes, so that threads that compute different rows never write to one byte: bit i % 8 (the lowest first) of byte
// i / 8 belongs to element i of its row.
struct GateLayout {
  int64_t row_size = 1;  // elements
  int64_t row_bytes = 1, image_bytes = 1;
};

// out = act(scale[k] * sum + bias[k] + residual). Null pointers omit their part. The activation is a ReLU, or a gate,
// which makes an element 0 where its bit is 0, or nothing.
template <class T>
struct Epilogue {
  const T* scale = nullptr;
  const T* bias = nullptr;
  const T* residual = nullptr;  // in the layout of the output, which it may be
  bool relu = false;
  uint8_t* gate_out = nullptr;  // receives the bits of the ReLU
  const uint8_t* gate = nullptr;
  GateLayout gate_layout = {};  // of both gates
};

}  // namespace sparse_adv
