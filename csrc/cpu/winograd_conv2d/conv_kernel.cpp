#include "cpu/winograd_conv2d/conv_kernel.h"

#include "cpu/simd_epilogue.h"
#include "cpu/winograd_conv2d/transformed_tile.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Input channels whose taps are gathered at a time, for 32 output channels side by side: 48 -> 21 ms for 512 channels
// (docs/design/winograd_conv2d.md).
constexpr int kWeightBlock = 16;

template <int TILE>
static void weight_of_panel(const WinogradWeight& weight, int64_t panel, int64_t begin, int64_t end, float* out) {
  constexpr int kSide = TILE + 2;
  const int64_t panels = (weight.out_channels + kPanel - 1) / kPanel, first = panel * kPanel;
  const int64_t pitch = panels * weight.in_channels * kPanel;
  const int64_t inside = weight.out_channels - first < kPanel ? weight.out_channels - first : kPanel;
  float taps[kWeightBlock][9][kPanel] = {};
  for (int64_t c0 = begin; c0 < end; c0 += kWeightBlock) {
    const int64_t block = end - c0 < kWeightBlock ? end - c0 : kWeightBlock;
    for (int64_t k = 0; k < inside; ++k)
      for (int tap = 0; tap < 9; ++tap) {
        const float* const from = weight.first + (first + k) * weight.out_stride + c0 * weight.in_stride +
                                  tap / 3 * weight.row_stride + tap % 3 * weight.col_stride;
        for (int64_t c = 0; c < block; ++c) taps[c][tap][k] = from[c * weight.in_stride];
      }
    for (int64_t c = 0; c < block; ++c)
      for (int64_t k = 0; k < kPanel; k += kLanes) {
        Vec g[9], half[kSide * 3], result[kSide * kSide];
        for (int tap = 0; tap < 9; ++tap) g[tap] = load(&taps[c][tap][k]);
        for (int s = 0; s < 3; ++s) transform_taps<TILE>(g + s, 3, half + s, 3);
        for (int i = 0; i < kSide; ++i) transform_taps<TILE>(half + 3 * i, 1, result + kSide * i, 1);
        float* const to = out + (panel * weight.in_channels + c0 + c) * kPanel + k;
        for (int i = 0; i < kSide * kSide; ++i) store(to + i * pitch, result[i]);
      }
  }
}

void winograd_weight(const WinogradWeight& weight, int64_t tile, int64_t panel, int64_t begin, int64_t end,
                     float* out) {
  (tile == 2 ? &weight_of_panel<2> : &weight_of_panel<4>)(weight, panel, begin, end, out);
}

constexpr int kVectors = 2;                   // of a panel, side by side
constexpr int kRows = kLanes == 16 ? 12 : 6;  // 24 or 12 accumulators

// product[row][k] = sum over c of v[row][c] * panel[c][k], for VECTORS vectors of k.
template <int ROWS, int VECTORS>
static void multiply_rows(int64_t channels, const float* v, const float* panel, float* product, int64_t pitch) {
  Vec sums[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) sums[row][i] = broadcast(0.0f);
  for (int64_t c = 0; c < channels; ++c) {
    Vec w[VECTORS];
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) w[i] = load(panel + c * kPanel + i * kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
      const Vec x = broadcast(v[row * channels + c]);
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i) sums[row][i] = fma(x, w[i], sums[row][i]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) store(product + row * pitch + i * kLanes, sums[row][i]);
}

template <int VECTORS>
static void multiply(int64_t rows, int64_t channels, const float* v, const float* panel, float* product,
                     int64_t pitch) {
  int64_t row = 0;
  const auto take = [&](auto kernel, int64_t step) {
    for (; row + step <= rows; row += step) kernel(channels, v + row * channels, panel, product + row * pitch, pitch);
  };
  take(&multiply_rows<kRows, VECTORS>, kRows);
  if (kRows > 8) take(&multiply_rows<8, VECTORS>, 8);
  take(&multiply_rows<4, VECTORS>, 4);
  take(&multiply_rows<2, VECTORS>, 2);
  take(&multiply_rows<1, VECTORS>, 1);
}

// Reads the sums m[element * pitch + channel] of a tile and writes its pixels.
template <int TILE>
static void output_of_tile(const Winograd& conv, const float* m, int64_t pitch, int64_t tile, float* out,
                           const Epilogue<float>& epilogue) {
  constexpr int kSide = TILE + 2;
  const Corner corner(conv, tile);
  const int rows = conv.P - corner.row < TILE ? static_cast<int>(conv.P - corner.row) : TILE;
  const int cols = conv.Q - corner.col < TILE ? static_cast<int>(conv.Q - corner.col) : TILE;
  const int64_t first = (corner.image * conv.P + corner.row) * conv.Q + corner.col;
  for (int64_t k = 0; k < conv.K; k += kLanes) {
    const int count = conv.K - k < kLanes ? static_cast<int>(conv.K - k) : kLanes;
    Vec sums[kSide * kSide];
    for (int s = 0; s < kSide; ++s) {
#pragma GCC unroll 6
      for (int r = 0; r < kSide; ++r) sums[r * kSide + s] = load(m + (r * kSide + s) * pitch + k);
      transform_output<TILE>(sums + s, kSide);
    }
    const Vec bias = epilogue.bias ? load_up_to(epilogue.bias + k, count) : broadcast(0.0f);
    for (int r = 0; r < rows; ++r) {
      transform_output<TILE>(sums + r * kSide, 1);
      for (int s = 0; s < cols; ++s) {
        const int64_t pixel = first + r * conv.Q + s, at = pixel * conv.pixel_stride + k;
        BitsInRow<kLanes> bits{.row_start = pixel * epilogue.gate_layout.row_bytes, .column = k};
        store_up_to(out + at, finish(sums[r * kSide + s] + bias, epilogue, at, count, bits), count);
      }
    }
  }
}

template <int TILE>
static void tiles(const Winograd& conv, const float* input, const float* weight, float* out,
                  const Epilogue<float>& epilogue, int64_t begin, int64_t end, float* scratch) {
  constexpr int kElements = (TILE + 2) * (TILE + 2);
  const int64_t count = end - begin, width = conv.panels * kPanel;
  float* const v = scratch;
  float* const m = v + kElements * count * conv.C;
  for (int64_t i = 0; i < count; ++i) input_of_tile<TILE>(conv, input, begin + i, v + i * conv.C, count * conv.C);
  for (int64_t element = 0; element < kElements; ++element)
    for (int64_t k = 0; k < conv.K; k += kVectors * kLanes) {
      const float* const panel = weight + (element * conv.panels + k / kPanel) * conv.C * kPanel + k % kPanel;
      const auto kernel = conv.K - k > kLanes ? &multiply<2> : &multiply<1>;
      kernel(count, conv.C, v + element * count * conv.C, panel, m + element * count * width + k, width);
    }
  for (int64_t i = 0; i < count; ++i)
    output_of_tile<TILE>(conv, m + i * width, count * width, begin + i, out, epilogue);
}

void winograd_tiles(const Winograd& conv, const float* input, const float* weight, float* out,
                    const Epilogue<float>& epilogue, int64_t begin, int64_t end, float* scratch) {
  (conv.tile == 2 ? &tiles<2> : &tiles<4>)(conv, input, weight, out, epilogue, begin, end, scratch);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
