#include "cpu/max_pool2d_kernel.h"

#include <type_traits>

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// SIZE is the rows and columns of the windows, or 0 if they are only known at run time. The compiler vectorises the
// loop over channels (channels_last); of NCHW images, float32 windows of 2 x 2 have functions of their own.
template <int SIZE>
static int64_t rows_of(const PoolRow& row) {
  return SIZE ? SIZE : row.rows;
}
template <int SIZE>
static int64_t cols_of(const PoolRow& row) {
  return SIZE ? SIZE : row.cols;
}

template <int SIZE, bool INDEXED, class T>
static void pool(const PoolRow& row, int64_t count, int64_t stride, int64_t step, const T* __restrict input,
                 T* __restrict out, uint8_t* __restrict index) {
  const int64_t rows = rows_of<SIZE>(row), cols = cols_of<SIZE>(row), pitch = row.row_pitch;
  for (int64_t i = 0; i < count; ++i) {
    const T* const window = input + i * stride;
    T best = window[0];
    int number = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < cols; ++s) {
        const T v = window[r * pitch + s * step];
        const bool larger = (v > best) | (v != v);
        best = larger ? v : best;
        number = larger ? static_cast<int>(r * cols + s) : number;
      }
    out[i] = best;
    if (INDEXED) index[i] = static_cast<uint8_t>(number);
  }
}

// `count` pairs of pixels of a row, as two vectors.
struct Pairs {
  Vec even, odd;
};
static inline Pairs load_pairs(const float* p, int count) {
  if (count == kLanes) {
    const Vec a = load(p), b = load(p + kLanes);
    return {deinterleave_even(a, b), deinterleave_odd(a, b)};
  }
  const int low = 2 * count < kLanes ? 2 * count : kLanes;
  const Vec a = load_first(p, low), b = load_first(p + low, 2 * count - low);
  return {deinterleave_even(a, b), deinterleave_odd(a, b)};
}
static inline void store_pairs(float* p, const Pairs& pairs, int count) {
  const int low = 2 * count < kLanes ? 2 * count : kLanes;
  store_up_to(p, interleave_low(pairs.even, pairs.odd), low);
  if (2 * count > low) store_up_to(p + low, interleave_high(pairs.even, pairs.odd), 2 * count - low);
}

// Calls visit(i, count) for the vectors of `windows` windows of 2 x 2 pixels.
template <class Visit>
static inline void for_each_vector(int64_t windows, Visit visit) {
  int64_t i = 0;
  for (; i + kLanes <= windows; i += kLanes) visit(i, kLanes);
  if (i < windows) visit(i, static_cast<int>(windows - i));
}

// The compiler does not vectorise the loop over windows: it took 9 times as long.
template <bool INDEXED>
static void pool_two(const PoolRow& row, const float* input, float* out, uint8_t* index) {
  for_each_vector(row.windows, [&](int64_t i, int count) {
    const Pairs above = load_pairs(input + 2 * i, count), below = load_pairs(input + row.row_pitch + 2 * i, count);
    Vec best = above.even, number = broadcast(0.0f);
    const Vec others[] = {above.odd, below.even, below.odd};
    for (int n = 0; n < 3; ++n) {
      const uint32_t larger = larger_bits(others[n], best);
      best = select(larger, others[n], best);
      number = select(larger, broadcast(static_cast<float>(n + 1)), number);
    }
    store_up_to(out + i, best, count);
    if (!INDEXED) return;
    float numbers[kLanes];
    store(numbers, number);
    for (int lane = 0; lane < count; ++lane) index[i + lane] = static_cast<uint8_t>(numbers[lane]);
  });
}

template <bool ADDS>
static void scatter_two(const PoolRow& row, const float* grad, const uint8_t* index, const float* residual,
                        float* grad_input) {
  for_each_vector(row.windows, [&](int64_t i, int count) {
    const Vec g = load_up_to(grad + i, count);
    uint8_t numbers[kLanes] = {};
    const uint8_t* at = index + i;
    if (count < kLanes) {
      for (int lane = 0; lane < count; ++lane) numbers[lane] = at[lane];
      at = numbers;
    }
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = r * row.row_pitch + 2 * i;
      Pairs pairs{zero_unless(equal_bits(at, static_cast<uint8_t>(2 * r)), g),
                  zero_unless(equal_bits(at, static_cast<uint8_t>(2 * r + 1)), g)};
      if (ADDS) {
        const Pairs added = load_pairs(residual + offset, count);
        pairs = {add(pairs.even, added.even), add(pairs.odd, added.odd)};
      }
      store_pairs(grad_input + offset, pairs, count);
    }
  });
}

template <int SIZE, bool INDEXED, class T>
static void pool_row(const PoolRow& row, const T* input, T* out, uint8_t* index) {
  if constexpr (SIZE == 2 && std::is_same_v<T, float>)
    if (row.step == 1) return pool_two<INDEXED>(row, input, out, index);
  if (row.step == 1) return pool<SIZE, INDEXED>(row, row.windows, cols_of<SIZE>(row), 1, input, out, index);
  for (int64_t q = 0; q < row.windows; ++q) {
    pool<SIZE, INDEXED>(row, row.step, 1, row.step, input, out, index);
    input += cols_of<SIZE>(row) * row.step;
    out += row.step;
    if (INDEXED) index += row.step;
  }
}

template <class T>
void max_pool2d_row(const PoolRow& row, const T* input, T* out, uint8_t* index) {
  const bool two = row.rows == 2 && row.cols == 2;
  const auto kernel = two ? (index ? &pool_row<2, true, T> : &pool_row<2, false, T>)
                          : (index ? &pool_row<0, true, T> : &pool_row<0, false, T>);
  kernel(row, input, out, index);
}

template <int SIZE, bool ADDS, class T>
static void scatter(const PoolRow& row, int64_t count, int64_t stride, int64_t step, const T* __restrict grad,
                    const uint8_t* __restrict index, const T* residual, T* grad_input) {
  const int64_t rows = rows_of<SIZE>(row), cols = cols_of<SIZE>(row);
  for (int64_t r = 0; r < rows; ++r) {
    const T* const added = residual + (ADDS ? r * row.row_pitch : 0);
    T* const line = grad_input + r * row.row_pitch;
#pragma GCC ivdep  // the residual is grad_input or does not overlap with it
    for (int64_t i = 0; i < count; ++i)
      for (int64_t s = 0; s < cols; ++s) {
        const T value = index[i] == r * cols + s ? grad[i] : T(0);
        line[i * stride + s * step] = ADDS ? added[i * stride + s * step] + value : value;
      }
  }
}

template <int SIZE, bool ADDS, class T>
static void scatter_row(const PoolRow& row, const T* grad, const uint8_t* index, const T* residual, T* grad_input) {
  if constexpr (SIZE == 2 && std::is_same_v<T, float>)
    if (row.step == 1) return scatter_two<ADDS>(row, grad, index, residual, grad_input);
  const int64_t cols = cols_of<SIZE>(row);
  if (row.step == 1) return scatter<SIZE, ADDS>(row, row.windows, cols, 1, grad, index, residual, grad_input);
  for (int64_t q = 0; q < row.windows; ++q, grad += row.step, index += row.step) {
    scatter<SIZE, ADDS>(row, row.step, 1, row.step, grad, index, residual, grad_input);
    grad_input += cols * row.step;
    if (ADDS) residual += cols * row.step;
  }
}

template <class T>
void max_pool2d_grad_row(const PoolRow& row, const T* grad, const uint8_t* index, const T* residual, T* grad_input) {
  const bool two = row.rows == 2 && row.cols == 2;
  const auto kernel = two ? (residual ? &scatter_row<2, true, T> : &scatter_row<2, false, T>)
                          : (residual ? &scatter_row<0, true, T> : &scatter_row<0, false, T>);
  kernel(row, grad, index, residual, grad_input);
}

#define SPARSE_ADV_INSTANTIATE(T)                                       \
  template void max_pool2d_row(const PoolRow&, const T*, T*, uint8_t*); \
  template void max_pool2d_grad_row(const PoolRow&, const T*, const uint8_t*, const T*, T*);
SPARSE_ADV_INSTANTIATE(float)
SPARSE_ADV_INSTANTIATE(double)
#undef SPARSE_ADV_INSTANTIATE

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
