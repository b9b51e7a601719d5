// Winograd's filtering: the transformed weights, some tiles of a convolution and the gradient of the weights, against
// direct loops.
#include "cpp/kernels_check.h"

namespace sparse_adv {

namespace {

constexpr int64_t kImages = 2;

Winograd geometry(int64_t tile, int64_t C, int64_t K, int64_t size, int64_t padding) {
  const int64_t out = size + 2 * padding - 2, tiles = (out + tile - 1) / tile;
  return {.tile = tile,
          .H = size,
          .W = size,
          .C = C,
          .P = out,
          .Q = out,
          .K = K,
          .pixel_stride = K,
          .pad_rows = padding,
          .pad_cols = padding,
          .tile_rows = tiles,
          .tile_cols = tiles,
          .panels = (K + kPanel - 1) / kPanel};
}

// The sums of the direct convolution [image][row][col][k] of channels_last images.
std::vector<double> convolve(const Winograd& conv, const std::vector<float>& input, const std::vector<float>& weight) {
  std::vector<double> sums(kImages * conv.P * conv.Q * conv.K);
  for (int64_t at = 0; at < std::ssize(sums); ++at) {
    const int64_t k = at % conv.K, col = at / conv.K % conv.Q, row = at / conv.K / conv.Q % conv.P;
    const int64_t image = at / conv.K / conv.Q / conv.P;
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t s = 0; s < 3; ++s) {
        const int64_t y = row - conv.pad_rows + r, x = col - conv.pad_cols + s;
        if (y < 0 || y >= conv.H || x < 0 || x >= conv.W) continue;
        for (int64_t c = 0; c < conv.C; ++c)
          sums[at] += static_cast<double>(input[((image * conv.H + y) * conv.W + x) * conv.C + c]) *
                      weight[((k * conv.C + c) * 3 + r) * 3 + s];
      }
  }
  return sums;
}

// The tile of an element of the output.
int64_t tile_of(const Winograd& conv, int64_t at) {
  const int64_t col = at / conv.K % conv.Q, row = at / conv.K / conv.Q % conv.P;
  const int64_t image = at / conv.K / conv.Q / conv.P;
  return (image * conv.tile_rows + row / conv.tile) * conv.tile_cols + col / conv.tile;
}

// The first and the last tile are left out.
bool check(const Kernels& kernels, int64_t tile, Activation activation, int64_t C, int64_t K, int64_t size,
           int64_t padding) {
  const Winograd conv = geometry(tile, C, K, size, padding);
  const int64_t elements = (tile + 2) * (tile + 2), tiles = kImages * conv.tile_rows * conv.tile_cols;
  const std::vector<float> input = numbers(kImages * size * size * C), weight = numbers(K * C * 9), bias = numbers(K),
                           residual = numbers(kImages * conv.P * conv.Q * K);
  std::vector<float> transformed(elements * conv.panels * C * kPanel, kUntouched);
  for (int64_t panel = 0; panel < conv.panels; ++panel) {
    const WinogradWeight operand{.first = weight.data(),
                                 .out_stride = C * 9,
                                 .in_stride = 9,
                                 .row_stride = 3,
                                 .col_stride = 1,
                                 .out_channels = K,
                                 .in_channels = C};
    kernels.winograd_weight(operand, tile, panel, 0, 1, transformed.data());
    kernels.winograd_weight(operand, tile, panel, 1, C, transformed.data());
  }
  std::vector<float> actual(residual.size(), kUntouched);
  const int64_t begin = 1, end = tiles - 1;
  std::vector<float> scratch((end - begin) * elements * (C + conv.panels * kPanel), kUntouched);
  Gates gates(activation, std::ssize(actual), K, std::ssize(actual) / kImages);
  Epilogue<float> epilogue{.bias = bias.data(), .residual = residual.data()};
  gates.activate(epilogue);
  kernels.winograd_tiles(conv, input.data(), transformed.data(), actual.data(), epilogue, begin, end, scratch.data());

  std::vector<double> expected = convolve(conv, input, weight);
  for (int64_t at = 0; at < std::ssize(expected); ++at) {
    const bool inside = tile_of(conv, at) >= begin && tile_of(conv, at) < end;
    expected[at] = inside ? with_epilogue(epilogue, expected[at], at % K, at) : kUntouched;
  }
  return equal(actual, expected) && gates.fit(actual);
}

bool check_grad_weight(const Kernels& kernels, int64_t tile, int64_t C, int64_t K, int64_t size, int64_t padding) {
  const Winograd conv = geometry(tile, C, K, size, padding);
  const int64_t elements = (tile + 2) * (tile + 2), width = conv.panels * kPanel;
  const int64_t tiles = kImages * conv.tile_rows * conv.tile_cols;
  const std::vector<float> input = numbers(kImages * size * size * C), grad = numbers(kImages * conv.P * conv.Q * K);
  std::vector<float> v(elements * tiles * C, kUntouched), z(elements * tiles * width, kUntouched);
  for (int64_t i = 0; i < tiles; ++i)
    kernels.winograd_grad_tile(conv, input.data(), grad.data(), i, tiles, v.data() + i * C, z.data() + i * width);
  std::vector<float> sums(elements * C * width, kUntouched), actual(K * C * 9, kUntouched);
  const int64_t half = tiles / 2;  // of the tiles: the second half is added to the sums of the first
  for (int64_t i = 0; i < elements; ++i)
    for (const auto& [begin, end] : {std::pair{int64_t{0}, C / 2}, std::pair{C / 2, C}})
      for (const auto& [first, last] : {std::pair{int64_t{0}, half}, std::pair{half, tiles}})
        kernels.winograd_grad_multiply(conv, last - first, v.data() + (i * tiles + first) * C,
                                       z.data() + (i * tiles + first) * width, begin, end, first == 0,
                                       sums.data() + i * C * width);
  kernels.winograd_grad_taps(conv, sums.data(), 0, C, actual.data());

  std::vector<double> expected(actual.size());
  for (int64_t at = 0; at < std::ssize(grad); ++at) {
    const int64_t k = at % K, col = at / K % conv.Q, row = at / K / conv.Q % conv.P, image = at / K / conv.Q / conv.P;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t y = row - padding + tap / 3, x = col - padding + tap % 3;
      if (y < 0 || y >= size || x < 0 || x >= size) continue;
      for (int64_t c = 0; c < C; ++c)
        expected[(k * C + c) * 9 + tap] +=
            static_cast<double>(grad[at]) * input[((image * size + y) * size + x) * C + c];
    }
  }
  return equal(actual, expected);
}

}  // namespace

bool check_winograd_grad_weight(const Kernels& kernels) {
  bool good = true;
  for (int64_t tile : {2, 4})
    for (int64_t size : {3, 9})
      for (int64_t padding : {1, 2})
        for (int64_t C : {1, 5, 19, 40})
          for (int64_t K : {3, 17, 40}) good &= check_grad_weight(kernels, tile, C, K, size, padding);
  return good;
}

bool check_winograd(const Kernels& kernels) {
  bool good = true;
  for (int64_t tile : {2, 4})
    for (Activation activation : kActivations)
      for (int64_t size : {3, 9})
        for (int64_t padding : {1, 2})
          for (int64_t C : {1, 5, 19})
            for (int64_t K : {3, 17, 40}) good &= check(kernels, tile, activation, C, K, size, padding);
  return good;
}

}  // namespace sparse_adv
