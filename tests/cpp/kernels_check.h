// All kernels of an instruction set, and helpers of their checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cpu/capability.h"
#include "cpu/masked_conv2d/batch_layout_kernel.h"
#include "cpu/masked_conv2d/col_indices_kernel.h"
#include "cpu/masked_conv2d/conv_kernel.h"
#include "cpu/masked_conv2d/grad_weight_kernel.h"
#include "cpu/masked_conv2d/width_layout_kernel.h"
#include "cpu/pgd_step_kernel.h"
#include "cpu/random_start_kernel.h"

namespace sparse_adv {

template <class T>
struct ElementKernels {
  decltype(&portable::pgd_step_linf<T>) step_linf;
  decltype(&portable::pgd_step_l2<T>) step_l2;
  decltype(&portable::random_start_linf<T>) start_linf;
  decltype(&portable::random_start_l2<T>) start_l2;
};

struct Kernels {
  const char* isa;
  int lanes;
  decltype(&portable::fill_batch_tile) fill_batch_tile;
  decltype(&portable::store_accumulators) store_accumulators;
  decltype(&portable::fill_width_tile) fill_width_tile;
  decltype(&portable::masked_conv2d_tile) conv_tile;
  decltype(&portable::masked_conv2d_grad_weight_tile) grad_weight_tile;
  decltype(&portable::col_indices_inside) col_indices_inside;
  decltype(&portable::col_indices_in_triples) col_indices_in_triples;
  decltype(&portable::col_indices_to_offsets) col_indices_to_offsets;
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

// The epilogue applied to a sum: `at` is its element in the output.
inline double with_epilogue(const Epilogue& epilogue, double sum, int64_t channel, int64_t at) {
  if (epilogue.scale) sum = sum * epilogue.scale[channel] + epilogue.bias[channel];
  if (epilogue.residual) sum += epilogue.residual[at];
  return epilogue.relu ? std::max(sum, 0.0) : sum;
}

bool check_fill_batch_tile(const Kernels& kernels);
bool check_store_accumulators(const Kernels& kernels);
bool check_fill_width_tile(const Kernels& kernels);
bool check_conv_tile(const Kernels& kernels);
bool check_grad_weight_tile(const Kernels& kernels);
bool check_col_indices(const Kernels& kernels);
template <class T>
bool check_pgd_step(const ElementKernels<T>& kernels);
template <class T>
bool check_random_start(const ElementKernels<T>& kernels);

}  // namespace sparse_adv
