#include "cpu/pointwise_kernel.h"

#include "cpu/simd_epilogue.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = kLanes;
};
template <>
struct Lanes<double> {
  static constexpr int count = 1;
};

template <bool CHANNELS_LAST, class T>
static void runs(const Pointwise<T>& operands, int64_t begin, int64_t end) {
  constexpr int lanes = Lanes<T>::count;
  const Epilogue<T>& epilogue = operands.epilogue;
  const GateLayout& gate = epilogue.gate_layout;
  const bool affine = epilogue.scale || epilogue.bias;
  const int64_t size = CHANNELS_LAST ? operands.channels : operands.pixels;
  const int64_t run_bytes = CHANNELS_LAST ? gate.row_bytes : gate.image_bytes / operands.channels;
  int64_t channel = CHANNELS_LAST ? 0 : begin % operands.channels;
  for (int64_t run = begin; run < end; ++run) {
    auto scale = broadcast(T(1)), bias = broadcast(T(0));
    if (!CHANNELS_LAST) {
      if (epilogue.scale) scale = broadcast(epilogue.scale[channel]);
      if (epilogue.bias) bias = broadcast(epilogue.bias[channel]);
      if (++channel == operands.channels) channel = 0;
    }
    BitsAcrossRows bits{
        .row_start = run * run_bytes, .column = 0, .row_size = gate.row_size, .row_bytes = gate.row_bytes};
    for (int64_t i = 0; i < size; i += lanes) {
      const int64_t at = run * size + i;
      const int count = size - i < lanes ? static_cast<int>(size - i) : lanes;
      auto v = count == lanes ? load(operands.input + at) : load_first(operands.input + at, count);
      if (CHANNELS_LAST && epilogue.scale) scale = load_first(epilogue.scale + i, count);
      if (CHANNELS_LAST && epilogue.bias) bias = load_first(epilogue.bias + i, count);
      if (affine) v = fma(v, scale, bias);
      v = finish(v, epilogue, at, count, bits);
      bits.advance(count);
      if (count == lanes)
        store(operands.out + at, v);
      else
        store_first(operands.out + at, v, count);
    }
  }
}

template <class T>
void pointwise(const Pointwise<T>& operands, int64_t begin, int64_t end) {
  if (operands.channels_last) return runs<true>(operands, begin, end);
  return runs<false>(operands, begin, end);
}

template void pointwise(const Pointwise<float>&, int64_t, int64_t);
template void pointwise(const Pointwise<double>&, int64_t, int64_t);

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
