#include "cpu/masked_conv2d/pattern_compiler.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace sparse_adv {

namespace {

// The kept weights in memory order: those of output channel k are codes[starts[k]] .. codes[starts[k + 1] - 1], each
// channel << kTapBits | tap with the channel's number within its group.
struct Kept {
  std::vector<int32_t> starts{0}, codes;

  Kept(const uint8_t* mask, int64_t out_channels, int64_t in_channels, int64_t taps) {
    const int64_t row_size = in_channels * taps;
    std::vector<int32_t> code_of(row_size);  // a table, because dividing by `taps` for each weight took half the time
    for (int64_t i = 0; i < row_size; ++i) code_of[i] = static_cast<int32_t>(i / taps << kTapBits | i % taps);
    codes.reserve(out_channels * row_size / 8);
    for (int64_t k = 0; k < out_channels; ++k) {
      const uint8_t* row = mask + k * row_size;
      for (int64_t i = 0; i < row_size; i += 8) {
        const int64_t end = std::min(row_size, i + 8);
        uint64_t eight = 0;
        std::memcpy(&eight, row + i, end - i);
        if (eight == 0) continue;
        for (int64_t j = i; j < end; ++j)
          if (row[j]) codes.push_back(code_of[j]);
      }
      starts.push_back(static_cast<int32_t>(codes.size()));
    }
  }
};

// The channels of a segment: enough for a list to hold 7 entries per output channel of a vector, which hides loading
// and storing the accumulators; no more, so that the part of the image that a segment reads stays in the L1. A vector
// of 4 reads tiles of 4 pixels, so more channels of them fit. Measured: docs/design/masked_conv2d.md.
int64_t segment_channels(int64_t kept, int64_t rows, int64_t channels, int64_t vector) {
  const double per_channel = static_cast<double>(kept) / static_cast<double>(std::max<int64_t>(rows * channels, 1));
  int64_t segment = vector == 4 ? 64 : 16;
  const int64_t limit = vector == 1 ? 64 : 256;
  while (segment < limit && static_cast<double>(segment) * per_channel < 7.0 * static_cast<double>(vector))
    segment *= 2;
  return segment;
}

struct Place {
  int64_t row, channel;  // within the group: the channel that the pass writes, and the one that it reads
  int32_t entry;
};

// Sorts the kept weights into lists; place_of(k, code) says where one belongs.
template <class PlaceOf>
Lists build(const Kept& kept, int64_t groups, int64_t group_rows, int64_t group_channels, int64_t vector,
            PlaceOf place_of) {
  const auto count = static_cast<int64_t>(kept.codes.size());
  const auto out_channels = static_cast<int64_t>(kept.starts.size()) - 1;
  Lists lists{vector, segment_channels(count, group_rows * groups, group_channels, vector), {}, {}};
  const int64_t vectors = (group_rows + vector - 1) / vector;
  const int64_t segments = (group_channels + lists.segment_channels - 1) / lists.segment_channels;
  const int vector_bits = std::countr_zero(static_cast<uint64_t>(vector));
  const int segment_bits = std::countr_zero(static_cast<uint64_t>(lists.segment_channels));
  auto for_each_entry = [&](auto visit) {
    for (int64_t k = 0; k < out_channels; ++k) {
      const int64_t group = k / (out_channels / groups);
      for (int32_t i = kept.starts[k]; i < kept.starts[k + 1]; ++i) {
        const Place place = place_of(k, kept.codes[i]);
        if (place.row & (vector - 1)) continue;  // the first row stands for the vector
        visit((place.channel >> segment_bits) * vectors * groups + group * vectors + (place.row >> vector_bits),
              place.entry);
      }
    }
  };
  lists.rows.assign(segments * vectors * groups + 1, 0);
  for_each_entry([&](int64_t list, int32_t) { ++lists.rows[list + 1]; });
  for (size_t i = 1; i < lists.rows.size(); ++i) lists.rows[i] += lists.rows[i - 1];
  lists.entries.resize(lists.rows.back());
  std::vector<int32_t> next(lists.rows.begin(), lists.rows.end() - 1);
  for_each_entry([&](int64_t list, int32_t entry) { lists.entries[next[list]++] = entry; });
  return lists;
}

// The widest of 4, 2 and 1 output channels that can be computed together, so that a vector lies in one block and group.
int64_t vector_of(int64_t block, int64_t groups, int64_t group_rows) {
  for (int64_t vector : {4, 2})
    if (block % vector == 0 && (groups == 1 || group_rows % vector == 0)) return vector;
  return 1;
}

}  // namespace

CompiledMask compile_mask(const uint8_t* mask, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& block,
                          int64_t groups) {
  const int64_t out_channels = sizes[0], in_channels = sizes[1], taps = sizes[2] * sizes[3];
  if (groups < 1 || out_channels % groups != 0) throw std::invalid_argument("groups must divide the mask's rows");
  if (std::ranges::any_of(block, [](int64_t size) { return size < 1; }))
    throw std::invalid_argument("block sizes must be positive");
  if (taps > kMaxTaps || out_channels > kMaxChannels || in_channels * groups > kMaxChannels)
    throw std::invalid_argument("mask is too large");
  const int64_t group_out = out_channels / groups;
  CompiledMask compiled{};
  const Kept kept(mask, out_channels, in_channels, taps);
  compiled.forward = build(kept, groups, group_out, in_channels, vector_of(block[0], groups, group_out),
                           [&](int64_t k, int32_t code) -> Place {
                             const int64_t first = k / group_out * in_channels;
                             return {k % group_out, code >> kTapBits, static_cast<int32_t>(code + (first << kTapBits))};
                           });
  compiled.grad_input = build(kept, groups, in_channels, group_out, vector_of(block[1], groups, in_channels),
                              [&](int64_t k, int32_t code) -> Place {
                                const auto tap = static_cast<int32_t>(code & (kMaxTaps - 1));
                                return {code >> kTapBits, k % group_out, static_cast<int32_t>(k << kTapBits) | tap};
                              });

  compiled.header[kFormat] = kPatternFormat;
  compiled.header[kOutChannels] = out_channels;
  compiled.header[kGroupInChannels] = in_channels;
  compiled.header[kFilterRows] = sizes[2];
  compiled.header[kFilterCols] = sizes[3];
  compiled.header[kGroups] = groups;
  std::copy_n(block.data(), 4, compiled.header.begin() + kBlockOut);
  compiled.header[kKept] = static_cast<int64_t>(kept.codes.size());
  compiled.header[kVector] = compiled.forward.vector;
  compiled.header[kSegmentChannels] = compiled.forward.segment_channels;
  compiled.header[kGradInputVector] = compiled.grad_input.vector;
  compiled.header[kGradInputSegmentChannels] = compiled.grad_input.segment_channels;
  return compiled;
}

}  // namespace sparse_adv
