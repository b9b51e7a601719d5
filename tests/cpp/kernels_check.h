// All kernels of an instruction set, and helpers of their checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cpu/batch_norm_act_kernel.h"
#include "cpu/capability.h"
#include "cpu/masked_conv2d/batch_layout_kernel.h"
#include "cpu/masked_conv2d/col_indices_kernel.h"
#include "cpu/masked_conv2d/conv_kernel.h"
#include "cpu/masked_conv2d/grad_weight_kernel.h"
#include "cpu/masked_conv2d/width_layout_kernel.h"
#include "cpu/masked_winograd_conv2d/conv_kernel.h"
#include "cpu/masked_winograd_conv2d/weight_kernel.h"
#include "cpu/max_pool2d_kernel.h"
#include "cpu/pgd_step_kernel.h"
#include "cpu/pointwise_kernel.h"
#include "cpu/random_start_kernel.h"
#include "cpu/winograd_conv2d/conv_kernel.h"
#include "cpu/winograd_conv2d/grad_weight_kernel.h"

namespace sparse_adv {

template <class T>
struct ElementKernels {
  decltype(&portable::pgd_step_linf<T>) step_linf;
  decltype(&portable::pgd_step_l2<T>) step_l2;
  decltype(&portable::random_start_linf<T>) start_linf;
  decltype(&portable::random_start_l2<T>) start_l2;
  decltype(&portable::pointwise<T>) pointwise;
  decltype(&portable::batch_norm_channel_sums<T>) channel_sums;
  decltype(&portable::batch_norm_pixel_sums<T>) pixel_sums;
  decltype(&portable::batch_norm_grad_input<T>) norm_grad_input;
  decltype(&portable::max_pool2d_row<T>) pool_row;
  decltype(&portable::max_pool2d_grad_row<T>) pool_grad_row;
};

struct Kernels {
  const char* isa;
  int lanes;
  decltype(&portable::fill_batch_tile) fill_batch_tile;
  decltype(&portable::store_accumulators) store_accumulators;
  decltype(&portable::fill_width_tile) fill_width_tile;
  decltype(&portable::store_joined_rows) store_joined_rows;
  decltype(&portable::masked_conv2d_tile) conv_tile;
  decltype(&portable::masked_conv2d_grad_weight_tile) grad_weight_tile;
  decltype(&portable::register_block_of_tile) register_block_of_tile;
  decltype(&portable::col_indices_inside) col_indices_inside;
  decltype(&portable::col_indices_in_triples) col_indices_in_triples;
  decltype(&portable::find_filter_rows) find_filter_rows;
  decltype(&portable::col_indices_to_offsets) col_indices_to_offsets;
  decltype(&portable::masked_winograd_weight) masked_winograd_weight;
  decltype(&portable::masked_winograd_joined_tiles) masked_winograd_joined_tiles;
  decltype(&portable::masked_winograd_item) masked_winograd_item;
  decltype(&portable::winograd_weight) winograd_weight;
  decltype(&portable::winograd_tiles) winograd_tiles;
  decltype(&portable::winograd_grad_tile) winograd_grad_tile;
  decltype(&portable::winograd_grad_multiply) winograd_grad_multiply;
  decltype(&portable::winograd_grad_taps) winograd_grad_taps;
  ElementKernels<float> of_float;
  ElementKernels<double> of_double;
};

constexpr float kUntouched = std::numeric_limits<float>::quiet_NaN();

inline std::mt19937 random_bits(0);

inline int64_t below(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }

template <class T = float>
std::vector<T> numbers(int64_t count) {
  std::uniform_real_distribution<T> uniform(-1, 1);
  std::vector<T> values(count);
  for (T& value : values) value = uniform(random_bits);
  return values;
}

// Equal up to the rounding of a few hundred float32 terms below 1, or of one float64 expression; NaN only to NaN.
template <class T>
bool equal(const std::vector<T>& actual, const std::vector<double>& expected) {
  const double tolerance = sizeof(T) == sizeof(float) ? 1e-4 : 1e-12;
  return std::ranges::equal(actual, expected, [&](double a, double b) {
    return std::isnan(b) ? std::isnan(a) : std::abs(a - b) <= tolerance;
  });
}

// The activations of an epilogue, with memory for the gates of `elements` elements in rows of `row_size`.
enum class Activation { none, relu, relu_with_gate, gate };
constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::relu_with_gate,
                                       Activation::gate};
constexpr uint8_t kUntouchedByte = 0xaa;

class Gates {
 public:
  Gates(Activation activation, int64_t elements, int64_t row_size, int64_t image_size)
      : activation_(activation),
        layout_{.row_size = row_size,
                .row_bytes = (row_size + 7) / 8,
                .image_bytes = image_size / row_size * ((row_size + 7) / 8)},
        written_(elements / row_size * layout_.row_bytes, kUntouchedByte),
        read_(written_.size()) {
    for (uint8_t& byte : read_) byte = static_cast<uint8_t>(below(256));
  }

  template <class T>
  void activate(Epilogue<T>& epilogue) {
    epilogue.relu = activation_ == Activation::relu || activation_ == Activation::relu_with_gate;
    epilogue.gate_out = activation_ == Activation::relu_with_gate ? written_.data() : nullptr;
    epilogue.gate = activation_ == Activation::gate ? read_.data() : nullptr;
    epilogue.gate_layout = layout_;
  }

  // Whether the gate has the bits of the rows that were written, 0 behind their ends, and no other bits.
  template <class T>
  bool fit(const std::vector<T>& output) const {
    if (activation_ != Activation::relu_with_gate) return true;
    std::vector<uint8_t> expected(written_.size(), kUntouchedByte);
    for (int64_t at = 0; at < std::ssize(output); ++at) {
      if (std::isnan(output[at])) continue;
      const int64_t column = at % layout_.row_size;
      uint8_t& byte = expected[at / layout_.row_size * layout_.row_bytes + column / 8];
      if (column % 8 == 0) byte = 0;
      byte |= static_cast<uint8_t>((output[at] > 0) << column % 8);
    }
    return written_ == expected;
  }

 private:
  Activation activation_;
  GateLayout layout_;
  std::vector<uint8_t> written_, read_;
};

// The epilogue applied to a sum: `at` is its element in the output.
template <class T>
double with_epilogue(const Epilogue<T>& epilogue, double sum, int64_t channel, int64_t at) {
  if (epilogue.scale) sum *= epilogue.scale[channel];
  if (epilogue.bias) sum += epilogue.bias[channel];
  if (epilogue.residual) sum += epilogue.residual[at];
  if (epilogue.gate) {
    const auto& [row_size, row_bytes, image_bytes] = epilogue.gate_layout;
    const int64_t column = at % row_size;
    return epilogue.gate[at / row_size * row_bytes + column / 8] >> column % 8 & 1 ? sum : 0.0;
  }
  return epilogue.relu ? std::max(sum, 0.0) : sum;
}

bool check_gate_rows();
bool check_shared_items();
bool check_fill_batch_tile(const Kernels& kernels);
bool check_store_accumulators(const Kernels& kernels);
bool check_fill_width_tile(const Kernels& kernels);
bool check_store_joined_rows(const Kernels& kernels);
bool check_conv_tile(const Kernels& kernels);
bool check_grad_weight_tile(const Kernels& kernels);
bool check_col_indices(const Kernels& kernels);
bool check_masked_winograd(const Kernels& kernels);
bool check_winograd(const Kernels& kernels);
bool check_winograd_grad_weight(const Kernels& kernels);
template <class T>
bool check_batch_norm_act(const ElementKernels<T>& kernels);
template <class T>
bool check_max_pool2d(const ElementKernels<T>& kernels);
template <class T>
bool check_pgd_step(const ElementKernels<T>& kernels);
template <class T>
bool check_pointwise(const ElementKernels<T>& kernels);
template <class T>
bool check_random_start(const ElementKernels<T>& kernels);

}  // namespace sparse_adv
