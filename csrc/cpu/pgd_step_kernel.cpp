#include "cpu/pgd_step_kernel.h"

// Lets the compiler vectorise the next loop without overlap checks: its output may be one of its inputs, but never a
// shifted view of one.
#ifdef __clang__
#define SPARSE_ADV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SPARSE_ADV_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

namespace {

// NaN stays NaN, as in torch.clamp.
template <class T>
T clamp(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Sums in double, in an order that depends only on `count`: 16 partial sums, which GCC keeps in vector registers.
template <class Value>
double sum_of_squares(int64_t count, Value value) {
  constexpr int kPartialSums = 16;
  double sums[kPartialSums] = {};
  int64_t i = 0;
  for (; i + kPartialSums <= count; i += kPartialSums)
    for (int j = 0; j < kPartialSums; ++j) sums[j] += value(i + j) * value(i + j);
  for (; i < count; ++i) sums[i % kPartialSums] += value(i) * value(i);
  double sum = 0;
  for (double partial : sums) sum += partial;
  return sum;
}

template <class T>
void l2_sample(const T* adv, const T* grad, const T* clean, T* out, int64_t count, const StepSizes& sizes) {
  // Elements that are not finite count as 0. Otherwise one overflow would make the norm infinite, and the image would
  // not move.
  auto slope = [=](int64_t i) { return static_cast<double>(grad[i] - grad[i] == 0 ? grad[i] : T(0)); };
  const double length = __builtin_sqrt(sum_of_squares(count, slope));
  const double rate = length > 0 ? sizes.alpha / length : 0.0;
  SPARSE_ADV_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(adv[i] + rate * slope(i));

  auto offset = [=](int64_t i) { return static_cast<double>(out[i]) - static_cast<double>(clean[i]); };
  const double distance = __builtin_sqrt(sum_of_squares(count, offset));
  const T lo = static_cast<T>(sizes.lo), hi = static_cast<T>(sizes.hi);
  if (distance <= sizes.eps) {
    for (int64_t i = 0; i < count; ++i) out[i] = clamp(out[i], lo, hi);
    return;
  }
  const double shrink = sizes.eps / distance;
  SPARSE_ADV_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = clamp(static_cast<T>(clean[i] + shrink * offset(i)), lo, hi);
}

}  // namespace

// alpha * sign is exact, so contraction into an FMA does not change the result.
template <class T>
void pgd_step_linf(const T* adv, const T* grad, const T* clean, T* out, int64_t count, const StepSizes& sizes) {
  const T alpha = static_cast<T>(sizes.alpha), eps = static_cast<T>(sizes.eps);
  const T lo = static_cast<T>(sizes.lo), hi = static_cast<T>(sizes.hi);
  SPARSE_ADV_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const T sign = (grad[i] > 0 ? T(1) : T(0)) - (grad[i] < 0 ? T(1) : T(0));
    const T moved = clamp(adv[i] + alpha * sign, clean[i] - eps, clean[i] + eps);
    // Comparisons with NaN are false, so the clamps would ignore a NaN in clean: it is copied explicitly.
    out[i] = clean[i] == clean[i] ? clamp(moved, lo, hi) : clean[i];
  }
}

template <class T>
void pgd_step_l2(const T* adv, const T* grad, const T* clean, T* out, int64_t samples, int64_t count,
                 const StepSizes& sizes) {
  for (int64_t n = 0; n < samples; ++n) {
    const int64_t first = n * count;
    l2_sample(adv + first, grad + first, clean + first, out + first, count, sizes);
  }
}

template void pgd_step_linf(const float*, const float*, const float*, float*, int64_t, const StepSizes&);
template void pgd_step_linf(const double*, const double*, const double*, double*, int64_t, const StepSizes&);
template void pgd_step_l2(const float*, const float*, const float*, float*, int64_t, int64_t, const StepSizes&);
template void pgd_step_l2(const double*, const double*, const double*, double*, int64_t, int64_t, const StepSizes&);

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
