#include "cpu/masked_winograd_conv2d/conv_kernel.h"

#include "cpu/simd_epilogue.h"
#include "cpu/simd_windows.h"
#include "cpu/winograd_conv2d/transforms.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Row `row` of the windows of kLanes tiles, as 6 vectors of tiles.
template <bool JOINED>
static inline __attribute__((always_inline)) void load_row(const TileRun* runs, const float* input, int row,
                                                           Vec columns[kWindow]) {
  Vec first[4], last[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if constexpr (JOINED) {
      const TileRun& run = runs[j];
      first[j] = load_where(input + run.input, run.first[row]);
      last[j] = load_where(input + run.input + 4, run.last[row]);
    } else {
      const float* p[kQuads];
      uint32_t bits[kQuads];
#pragma GCC unroll 4
      for (int i = 0; i < kQuads; ++i) {
        const TileRun& run = runs[j * kQuads + i];
        p[i] = input + run.input;
        bits[i] = run.first[row] | run.last[row] << 4;
      }
      load_windows(p, bits, first[j], last[j]);
    }
  }
  transpose_fours(first);
  transpose_fours(last);
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) columns[s] = first[s];
  columns[4] = last[0];
  columns[5] = last[1];
}

// No hardware prefetcher foresees the next channels of joined runs, which lie in other pages. 2: chosen, not tuned.
constexpr int kChannelsAhead = 2;
constexpr int kRunsOfLine = kLineFloats / kLanes;

static inline __attribute__((always_inline)) void prefetch_windows(const ConvSizes& sizes, const TileRun* runs,
                                                                   const float* input) {
  const float* row = input + kChannelsAhead * sizes.input_pixels;
  for (int r = 0; r < kWindow; ++r, row += sizes.input_row_size)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j += kRunsOfLine) __builtin_prefetch(row + runs[j].input);
}

// V = B^T d B for all tiles and input channels.
template <bool JOINED>
static void transform_windows(const ConvSizes& sizes, const TileItem& item, const float* input, float* v) {
  constexpr int kRuns = JOINED ? 4 : kLanes;
  const int64_t pitch = sizes.v_pitch(item.tiles);
  for (int64_t c = 0; c < sizes.C; ++c, v += item.tiles, input += sizes.input_pixels) {
    const TileRun* runs = item.runs;
    for (int64_t tile = 0; tile < item.tiles; tile += kLanes, runs += kRuns) {
      if constexpr (JOINED) prefetch_windows(sizes, runs, input);
      Vec d[kElements];
      const float* row = input;
      for (int r = 0; r < kWindow; ++r, row += sizes.input_row_size) {
        load_row<JOINED>(runs, row, r, d + r * kWindow);
        transform_input<4>(d + r * kWindow, 1);
      }
      float* to = v + tile;
      for (int s = 0; s < kWindow; ++s, to += pitch) {
        transform_input<4>(d + s, kWindow);
        float* element = to;
#pragma GCC unroll 6
        for (int r = 0; r < kWindow; ++r, element += kWindow * pitch) store(element, d[r * kWindow + s]);
      }
    }
  }
}

// m[j][tile] = sum over the filters of a row of values[filter][j] * v[channel][tile], for VECTORS vectors of tiles.
template <int OC_BLOCK, int VECTORS>
static inline __attribute__((always_inline)) void add_filters(const float* v, const int32_t* channels,
                                                              const float* values, int64_t count, int64_t tiles,
                                                              float* m, int64_t m_pitch) {
  Vec acc[OC_BLOCK][VECTORS];
#pragma GCC unroll 4
  for (int j = 0; j < OC_BLOCK; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) acc[j][i] = broadcast(0.0f);
  for (int64_t filter = 0; filter < count; ++filter) {
    const float* const from = in_register(v + channels[filter] * tiles);
    Vec value[OC_BLOCK];
#pragma GCC unroll 4
    for (int j = 0; j < OC_BLOCK; ++j) value[j] = broadcast(values[filter * OC_BLOCK + j]);
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) {
      Vec x = load(from + i * kLanes);
      if constexpr (OC_BLOCK > 1) x = in_register(x);
#pragma GCC unroll 4
      for (int j = 0; j < OC_BLOCK; ++j) acc[j][i] = fma(x, value[j], acc[j][i]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < OC_BLOCK; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) store(m + j * m_pitch + i * kLanes, acc[j][i]);
}

// The sums of one element for the rows [begin, end).
template <int OC_BLOCK>
static void multiply(const LiveFilters& filters, int64_t begin, int64_t end, int64_t tiles, const float* v,
                     const float* values, float* m, int64_t m_pitch) {
  for (int64_t row = begin; row < end; ++row, m += OC_BLOCK * m_pitch) {
    const int64_t first = filters.row_offsets[row], count = filters.row_offsets[row + 1] - first;
    const int32_t* const channels = filters.channels + first;
    const float* const of_row = values + first * OC_BLOCK;
    int64_t tile = 0;
    constexpr int kMost = kAccumulators / OC_BLOCK < 8 ? kAccumulators / OC_BLOCK : 8;
    for (; tile + kMost * kLanes <= tiles; tile += kMost * kLanes)
      add_filters<OC_BLOCK, kMost>(v + tile, channels, of_row, count, tiles, m + tile, m_pitch);
    if constexpr (kMost > 4)
      for (; tile + 4 * kLanes <= tiles; tile += 4 * kLanes)
        add_filters<OC_BLOCK, 4>(v + tile, channels, of_row, count, tiles, m + tile, m_pitch);
    if constexpr (kMost > 2)
      for (; tile + 2 * kLanes <= tiles; tile += 2 * kLanes)
        add_filters<OC_BLOCK, 2>(v + tile, channels, of_row, count, tiles, m + tile, m_pitch);
    for (; tile < tiles; tile += kLanes)
      add_filters<OC_BLOCK, 1>(v + tile, channels, of_row, count, tiles, m + tile, m_pitch);
  }
}

// Applies the epilogue to the pixels of a joined run in one of its rows, and writes them.
static inline __attribute__((always_inline)) void write_run(const ConvSizes& sizes, const TileRun& run, int row,
                                                            int64_t channel, Vec pixels,
                                                            const Epilogue<float>& epilogue, float* out) {
  if (row >= run.rows) return;
  const int64_t plane = (run.image * sizes.K + channel) * sizes.output_pixels;
  const int64_t at = plane + (run.row + row) * sizes.output_row_size + run.col;
  const GateLayout& gate = epilogue.gate_layout;
  BitsInRow<kLanes> bits{.row_start = run.image * gate.image_bytes + channel * (gate.image_bytes / sizes.K) +
                                      (run.row + row) * gate.row_bytes,
                         .column = run.col};
  store_up_to(out + at, finish(pixels, epilogue, at, run.cols, bits), run.cols);
}

static inline void prefetch_run(const ConvSizes& sizes, const TileRun& run, int64_t channel, const float* residual,
                                float* out) {
  if (channel >= sizes.K) return;
  int64_t at = (run.image * sizes.K + channel) * sizes.output_pixels + run.row * sizes.output_row_size + run.col;
  for (int row = 0; row < run.rows; ++row, at += sizes.output_row_size) {
    __builtin_prefetch(out + at, 1);
    if (residual) __builtin_prefetch(residual + at);
  }
}

static void write_plane(const ConvSizes& sizes, const TileItem& item, int64_t channel, const float* plane,
                        const Epilogue<float>& epilogue, float* out) {
  for (int64_t n = 0; n < item.write_count; ++n) {
    const PixelRun& run = item.writes[n];
    const int64_t in_image = channel * sizes.output_pixels + run.pixel;
    const int64_t at = run.image * sizes.K * sizes.output_pixels + in_image;
    BitsAcrossRows bits(epilogue.gate_layout, in_image, sizes.output_pixels);
    bits.row_start += run.image * epilogue.gate_layout.image_bytes;
    for (int64_t i = 0; i < run.size; i += kLanes, bits.advance(kLanes)) {
      const int count = run.size - i < kLanes ? static_cast<int>(run.size - i) : kLanes;
      store_up_to(out + at + i, finish(load(plane + run.plane + i), epilogue, at + i, count, bits), count);
    }
  }
}

// The output pixels of one channel: A^T m A for each tile, and the epilogue.
template <bool JOINED>
static void transform_sums(const ConvSizes& sizes, const TileItem& item, const float* m, int64_t channel,
                           const Epilogue<float>& operands, float* plane, float* out) {
  const Epilogue<float> epilogue = operands;  // a copy can stay in registers, whatever is stored
  const Vec bias = broadcast(epilogue.bias ? epilogue.bias[channel] : 0.0f);
  const TileRun* runs = item.runs;
  for (int64_t tile = 0; tile < item.tiles; tile += kLanes, runs += JOINED ? 4 : kLanes) {
    if constexpr (JOINED)
      for (int j = 0; j < 4; j += kRunsOfLine)
        prefetch_run(sizes, runs[j], channel + kChannelsAhead, epilogue.residual, out);
    Vec half[4][kWindow];
    const float* of_column = m + tile;
    for (int s = 0; s < kWindow; ++s, of_column += item.tiles) {
      Vec sums[kWindow];
      const float* element = of_column;
#pragma GCC unroll 6
      for (int r = 0; r < kWindow; ++r, element += kWindow * item.tiles) sums[r] = load(element);
      transform_output<4>(sums, 1);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) half[r][s] = sums[r];
    }
    for (int r = 0; r < 4; ++r) {
      Vec* const pixels = half[r];
      transform_output<4>(pixels, 1);
      for (int j = 0; j < 4; ++j) pixels[j] = add(pixels[j], bias);
      transpose_fours(pixels);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if constexpr (JOINED) {
          write_run(sizes, runs[j], r, channel, pixels[j], epilogue, out);
        } else {
          float* to[kQuads];
          for (int i = 0; i < kQuads; ++i) to[i] = plane + runs[j * kQuads + i].plane + r * item.plane_pitch;
          store_quads(pixels[j], to);
        }
      }
    }
  }
  if constexpr (!JOINED) write_plane(sizes, item, channel, plane, epilogue, out);
}

template <bool JOINED>
static void compute_item(const ConvSizes& sizes, const LiveFilters& filters, const float* values, const TileItem& item,
                         const float* input, float* out, const Epilogue<float>& epilogue, float* scratch) {
  const int64_t v_pitch = sizes.v_pitch(item.tiles), m_pitch = sizes.m_pitch(item.tiles);
  float *const v = scratch, *const m = v + kElements * v_pitch, *const plane = m + sizes.slice * m_pitch;
  const auto kernel = filters.oc_block == 4 ? &multiply<4> : filters.oc_block == 2 ? &multiply<2> : &multiply<1>;
  const int64_t rows_of_slice = sizes.slice / filters.oc_block;
  transform_windows<JOINED>(sizes, item, input, v);
  for (int64_t begin = 0; begin < filters.oc_blocks; begin += rows_of_slice) {
    const int64_t left = filters.oc_blocks - begin, end = begin + (left < rows_of_slice ? left : rows_of_slice);
    for (int64_t element = 0; element < kElements; ++element)
      kernel(filters, begin, end, item.tiles, v + element * v_pitch,
             values + element * filters.count * filters.oc_block, m + element * item.tiles, m_pitch);
    const int64_t first = begin * filters.oc_block, last = end * filters.oc_block;
    for (int64_t k = first; k < (last < sizes.K ? last : sizes.K); ++k)
      transform_sums<JOINED>(sizes, item, m + (k - first) * m_pitch, k, epilogue, plane, out);
  }
}

int masked_winograd_joined_tiles() { return kQuads; }

void masked_winograd_item(const ConvSizes& sizes, const LiveFilters& filters, const float* values, const TileItem& item,
                          const float* input, float* out, const Epilogue<float>& epilogue, float* scratch) {
  const auto compute = item.joined ? &compute_item<true> : &compute_item<false>;
  compute(sizes, filters, values, item, input, out, epilogue, scratch);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
