#include "cpu/pointwise_kernel.h"

#include "cpu/simd_runs.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

template <bool CHANNELS_LAST, class Bits, class T>
static void runs(const Pointwise<T>& operands, int64_t begin, int64_t end) {
  const Epilogue<T> epilogue = operands.epilogue;  // a copy can stay in registers, whatever is stored
  const T* const input = operands.input;
  T* const out = operands.out;
  const int64_t ahead = operands.runs.ahead;
  const bool affine = epilogue.scale || epilogue.bias;
  auto scale = broadcast(T(1)), bias = broadcast(T(0));
  visit_runs<T, Bits>(
      operands.runs, {.read = epilogue.gate, .write = epilogue.gate_out}, begin, end,
      [&](int64_t channel) __attribute__((always_inline)) {
        if (!CHANNELS_LAST && epilogue.scale) scale = broadcast(epilogue.scale[channel]);
        if (!CHANNELS_LAST && epilogue.bias) bias = broadcast(epilogue.bias[channel]);
      },
      [&](int64_t at, int64_t column, int count, Bits& bits) __attribute__((always_inline)) {
        if (CHANNELS_LAST && epilogue.scale) scale = load_up_to(epilogue.scale + column, count);
        if (CHANNELS_LAST && epilogue.bias) bias = load_up_to(epilogue.bias + column, count);
        __builtin_prefetch(input + at + ahead);
        __builtin_prefetch(out + at + ahead, 1);
        if (epilogue.residual) __builtin_prefetch(epilogue.residual + at + ahead);
        auto v = load_up_to(input + at, count);
        if (affine) v = fma(v, scale, bias);
        store_up_to(out + at, finish(v, epilogue, at, count, bits), count);
      },
      [](int64_t) {});
}

template <class T>
void pointwise(const Pointwise<T>& operands, int64_t begin, int64_t end) {
  const bool is_narrow = has_narrow_rows(operands.runs);
  if (operands.runs.channels_last)
    return (is_narrow ? &runs<true, NarrowRows<T>, T> : &runs<true, WideRows<T>, T>)(operands, begin, end);
  (is_narrow ? &runs<false, NarrowRows<T>, T> : &runs<false, WideRows<T>, T>)(operands, begin, end);
}

template void pointwise(const Pointwise<float>&, int64_t, int64_t);
template void pointwise(const Pointwise<double>&, int64_t, int64_t);

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
