#include "cpu/winograd_conv2d/grad_weight_kernel.h"

#include "cpu/winograd_conv2d/transformed_tile.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

template <int TILE>
static void gradient_of_tile(const Winograd& conv, const float* grad, int64_t tile, float* z, int64_t pitch) {
  constexpr int kSide = TILE + 2;
  const Corner corner(conv, tile);
  for (int64_t k = 0; k < conv.panels * kPanel; k += kLanes) {
    const int count = conv.K - k < kLanes ? static_cast<int>(conv.K - k) : kLanes;
    Vec pixels[TILE * TILE], half[kSide * TILE], result[kSide * kSide];
    for (int r = 0; r < TILE; ++r)
      for (int s = 0; s < TILE; ++s) {
        const int64_t row = corner.row + r, col = corner.col + s;
        const bool inside = row < conv.P && col < conv.Q && count > 0;
        const int64_t pixel = (corner.image * conv.P + row) * conv.Q + col;
        pixels[r * TILE + s] = inside ? load_up_to(grad + pixel * conv.pixel_stride + k, count) : broadcast(0.0f);
      }
    for (int s = 0; s < TILE; ++s) transform_gradient<TILE>(pixels + s, TILE, half + s, TILE);
    for (int r = 0; r < kSide; ++r) transform_gradient<TILE>(half + r * TILE, 1, result + r * kSide, 1);
    for (int i = 0; i < kSide * kSide; ++i) store(z + i * pitch + k, result[i]);
  }
}

void winograd_grad_tile(const Winograd& conv, const float* input, const float* grad, int64_t tile, int64_t pitch,
                        float* v, float* z) {
  (conv.tile == 2 ? &input_of_tile<2> : &input_of_tile<4>)(conv, input, tile, v, pitch * conv.C);
  (conv.tile == 2 ? &gradient_of_tile<2> : &gradient_of_tile<4>)(conv, grad, tile, z, pitch * conv.panels * kPanel);
}

constexpr int kVectors = 2;
constexpr int kChannels = kLanes == 16 ? 12 : 6;  // 24 or 12 accumulators

template <int CHANNELS>
static void multiply(const Winograd& conv, int64_t tiles, const float* v, const float* z, bool is_first, float* sums) {
  const int64_t width = conv.panels * kPanel;
  for (int64_t k = 0; k < width; k += kVectors * kLanes) {
    Vec acc[CHANNELS][kVectors];
#pragma GCC unroll 12
    for (int c = 0; c < CHANNELS; ++c)
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i)
        acc[c][i] = is_first ? broadcast(0.0f) : load(sums + c * width + k + i * kLanes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec w[kVectors];
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) w[i] = load(z + tile * width + k + i * kLanes);
#pragma GCC unroll 12
      for (int c = 0; c < CHANNELS; ++c) {
        const Vec x = broadcast(v[tile * conv.C + c]);
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i) acc[c][i] = fma(x, w[i], acc[c][i]);
      }
    }
#pragma GCC unroll 12
    for (int c = 0; c < CHANNELS; ++c)
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) store(sums + c * width + k + i * kLanes, acc[c][i]);
  }
}

void winograd_grad_multiply(const Winograd& conv, int64_t tiles, const float* v, const float* z, int64_t begin,
                            int64_t end, bool is_first, float* sums) {
  int64_t c = begin;
  const auto take = [&](auto kernel, int64_t step) {
    for (; c + step <= end; c += step) kernel(conv, tiles, v + c, z, is_first, sums + c * conv.panels * kPanel);
  };
  take(&multiply<kChannels>, kChannels);
  if (kChannels > 8) take(&multiply<8>, 8);
  take(&multiply<4>, 4);
  take(&multiply<2>, 2);
  take(&multiply<1>, 1);
}

template <int TILE>
static void taps(const Winograd& conv, const float* sums, int64_t begin, int64_t end, float* grad_weight) {
  constexpr int kSide = TILE + 2;
  const int64_t width = conv.panels * kPanel, pitch = conv.C * width;
  for (int64_t c = begin; c < end; ++c)
    for (int64_t k = 0; k < conv.K; k += kLanes) {
      const int count = conv.K - k < kLanes ? static_cast<int>(conv.K - k) : kLanes;
      Vec u[kSide * kSide], half[3 * kSide], g[9];
      for (int i = 0; i < kSide * kSide; ++i) u[i] = load(sums + i * pitch + c * width + k);
      for (int s = 0; s < kSide; ++s) transform_to_taps<TILE>(u + s, kSide, half + s, kSide);
      for (int r = 0; r < 3; ++r) transform_to_taps<TILE>(half + r * kSide, 1, g + 3 * r, 1);
      float lanes[9][kLanes];
      for (int tap = 0; tap < 9; ++tap) store(lanes[tap], g[tap]);
      for (int lane = 0; lane < count; ++lane)
        for (int tap = 0; tap < 9; ++tap) grad_weight[((k + lane) * conv.C + c) * 9 + tap] = lanes[tap][lane];
    }
}

void winograd_grad_taps(const Winograd& conv, const float* sums, int64_t begin, int64_t end, float* grad_weight) {
  (conv.tile == 2 ? &taps<2> : &taps<4>)(conv, sums, begin, end, grad_weight);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
