#include "cpu/batch_norm_act_kernel.h"

#include "cpu/simd_runs.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// A lane adds up this many elements in T before the sums continue in double. With float32 sums of whole rows the
// variance of 1024 x 1024 pixels was wrong by 6e-6.
constexpr int64_t kAddends = 256;

static inline double sum_of(double v) { return v; }
static inline double sum_of(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// The `count` elements at `at` of the gated gradient.
template <class T, class Bits>
static inline __attribute__((always_inline)) auto gated(const BatchNormSums<T>& operands, int64_t at, int count,
                                                        Bits& bits) {
  const auto g = load_up_to(operands.grad + at, count);
  return operands.gate ? zero_unless(bits.load(operands.gate, count), g) : g;
}

template <class T>
static inline __attribute__((always_inline)) void prefetch_operands(const BatchNormSums<T>& operands, int64_t at) {
  __builtin_prefetch(operands.input + at + operands.runs.ahead);
  if (operands.grad) __builtin_prefetch(operands.grad + at + operands.runs.ahead);
}

// The vector with zeros in the lanes from `count` on, which must not count in a sum.
static inline double only_first(double v, int) { return v; }
static inline Vec only_first(Vec v, int count) { return count == kLanes ? v : zero_unless(first_bits(count), v); }

// LONG: whether a run has more vectors than a lane may add up in T.
template <bool LONG, class T, class Bits>
static void channel_sums(const BatchNormSums<T>& shared, int64_t images, int64_t begin, int64_t end, double* first,
                         double* second) {
  using Values = decltype(broadcast(T(0)));
  const BatchNormSums<T> operands = shared;
  const Values zero = broadcast(T(0));
  Values firsts[kChannelsTogether], seconds[kChannelsTogether];
  for (int64_t c = begin; c < end; ++c) first[c] = second[c] = 0;
  const int64_t vectors = (operands.runs.size() + Lanes<T>::count - 1) / Lanes<T>::count;
  const int64_t stride = kAddends / vectors > 0 ? kAddends / vectors : 1;  // images
  for (int64_t start = 0; start < images; start += stride) {
    for (int64_t c = 0; c < end - begin; ++c) firsts[c] = seconds[c] = zero;
    const int64_t stop = start + stride < images ? start + stride : images;
    for (int64_t image = start; image < stop; ++image) {
      Values shift = zero, a = zero, b = zero;
      int64_t current = begin, added = 0;
      visit_runs<T, Bits>(
          operands.runs, {.read = operands.gate}, image * operands.runs.channels + begin,
          image * operands.runs.channels + end,
          [&](int64_t channel) __attribute__((always_inline)) {
            shift = broadcast(operands.minus_shift[channel]);
            a = b = zero;
            current = channel;
            added = 0;
          },
          [&](int64_t at, int64_t, int count, Bits& bits) __attribute__((always_inline)) {
            if (LONG && ++added > kAddends) {
              first[current] += sum_of(a);
              second[current] += sum_of(b);
              a = b = zero;
              added = 1;
            }
            prefetch_operands(operands, at);
            const Values d = only_first(add(load_up_to(operands.input + at, count), shift), count);
            const Values g = operands.grad ? gated(operands, at, count, bits) : d;
            a = add(a, g);
            b = fma(g, d, b);
          },
          [&](int64_t channel) __attribute__((always_inline)) {
            firsts[channel - begin] = add(firsts[channel - begin], a);
            seconds[channel - begin] = add(seconds[channel - begin], b);
          });
    }
    for (int64_t c = begin; c < end; ++c) {
      first[c] += sum_of(firsts[c - begin]);
      second[c] += sum_of(seconds[c - begin]);
    }
  }
}

template <class T>
void batch_norm_channel_sums(const BatchNormSums<T>& operands, int64_t images, int64_t begin, int64_t end,
                             double* first, double* second) {
  const bool is_long = operands.runs.size() > kAddends * Lanes<T>::count;
  auto sums = is_long ? &channel_sums<true, T, WideRows<T>> : &channel_sums<false, T, WideRows<T>>;
  if (has_narrow_rows(operands.runs))
    sums = is_long ? &channel_sums<true, T, NarrowRows<T>> : &channel_sums<false, T, NarrowRows<T>>;
  sums(operands, images, begin, end, first, second);
}

template <class Bits, class T>
static void pixel_sums(const BatchNormSums<T>& shared, int64_t begin, int64_t end, T* scratch, double* first,
                       double* second) {
  const BatchNormSums<T> operands = shared;
  const int64_t channels = operands.runs.channels;
  T *const firsts = scratch, *const seconds = scratch + channels;
  for (int64_t c = 0; c < channels; ++c) first[c] = second[c] = 0;
  for (int64_t start = begin; start < end; start += kAddends) {
    for (int64_t i = 0; i < 2 * channels; ++i) scratch[i] = 0;
    visit_runs<T, Bits>(
        operands.runs, {.read = operands.gate}, start, start + kAddends < end ? start + kAddends : end, [](int64_t) {},
        [&](int64_t at, int64_t column, int count, Bits& bits) __attribute__((always_inline)) {
          prefetch_operands(operands, at);
          const auto d = add(load_up_to(operands.input + at, count), load_up_to(operands.minus_shift + column, count));
          const auto g = operands.grad ? gated(operands, at, count, bits) : d;
          store_up_to(firsts + column, add(load_up_to(firsts + column, count), g), count);
          store_up_to(seconds + column, fma(g, d, load_up_to(seconds + column, count)), count);
        },
        [](int64_t) {});
    for (int64_t c = 0; c < channels; ++c) {
      first[c] += firsts[c];
      second[c] += seconds[c];
    }
  }
}

template <class T>
void batch_norm_pixel_sums(const BatchNormSums<T>& operands, int64_t begin, int64_t end, T* scratch, double* first,
                           double* second) {
  const bool is_narrow = has_narrow_rows(operands.runs);
  const auto sums = is_narrow ? &pixel_sums<NarrowRows<T>, T> : &pixel_sums<WideRows<T>, T>;
  sums(operands, begin, end, scratch, first, second);
}

template <bool CHANNELS_LAST, class Bits, class T>
static void grad_input(const BatchNormGradInput<T>& shared, int64_t begin, int64_t end) {
  const BatchNormGradInput<T> all = shared;
  const BatchNormSums<T>& operands = all.operands;
  auto shift = broadcast(T(0)), scale = shift, slope = shift, offset = shift;
  visit_runs<T, Bits>(
      operands.runs, {.read = operands.gate}, begin, end,
      [&](int64_t channel) __attribute__((always_inline)) {
        if (CHANNELS_LAST) return;
        shift = broadcast(operands.minus_shift[channel]);
        scale = broadcast(all.scale[channel]);
        slope = broadcast(all.slope[channel]);
        offset = broadcast(all.offset[channel]);
      },
      [&](int64_t at, int64_t column, int count, Bits& bits) __attribute__((always_inline)) {
        if (CHANNELS_LAST) {
          shift = load_up_to(operands.minus_shift + column, count);
          scale = load_up_to(all.scale + column, count);
          slope = load_up_to(all.slope + column, count);
          offset = load_up_to(all.offset + column, count);
        }
        prefetch_operands(operands, at);
        __builtin_prefetch(all.grad_input + at + operands.runs.ahead, 1);
        if (all.grad_residual) __builtin_prefetch(all.grad_residual + at + operands.runs.ahead, 1);
        const auto g = gated(operands, at, count, bits);
        const auto d = add(load_up_to(operands.input + at, count), shift);
        if (all.grad_residual) store_up_to(all.grad_residual + at, g, count);
        store_up_to(all.grad_input + at, fma(g, scale, fma(d, slope, offset)), count);
      },
      [](int64_t) {});
}

template <class T>
void batch_norm_grad_input(const BatchNormGradInput<T>& operands, int64_t begin, int64_t end) {
  const Runs& runs = operands.operands.runs;
  const bool is_narrow = has_narrow_rows(runs);
  if (runs.channels_last)
    return (is_narrow ? &grad_input<true, NarrowRows<T>, T> : &grad_input<true, WideRows<T>, T>)(operands, begin, end);
  (is_narrow ? &grad_input<false, NarrowRows<T>, T> : &grad_input<false, WideRows<T>, T>)(operands, begin, end);
}

#define SPARSE_ADV_INSTANTIATE(T)                                                                              \
  template void batch_norm_channel_sums(const BatchNormSums<T>&, int64_t, int64_t, int64_t, double*, double*); \
  template void batch_norm_pixel_sums(const BatchNormSums<T>&, int64_t, int64_t, T*, double*, double*);        \
  template void batch_norm_grad_input(const BatchNormGradInput<T>&, int64_t, int64_t);
SPARSE_ADV_INSTANTIATE(float)
SPARSE_ADV_INSTANTIATE(double)
#undef SPARSE_ADV_INSTANTIATE

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
