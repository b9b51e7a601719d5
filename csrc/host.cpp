// What is not a tensor op: the pattern compiler on NumPy arrays, the instruction set in use, and how this was built.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/capability.h"
#include "pattern_layout.h"

namespace py = pybind11;
using namespace sparse_adv;
using Int32Array = py::array_t<int32_t>;

namespace {

struct Lists {
  int64_t vector, segment_channels;
  std::vector<int32_t> rows, entries;
};

struct Entry {
  int64_t row, channel, tap;  // row: the channel that the pass writes; channel: the one that it reads
};

// Calls visit(k, c, tap) for each kept weight in memory order, skipping eight pruned ones at a time.
template <class Visit>
void for_each_kept(const uint8_t* mask, int64_t out_channels, int64_t in_channels, int64_t taps, Visit visit) {
  for (int64_t k = 0; k < out_channels; ++k) {
    const uint8_t* row = mask + k * in_channels * taps;
    const int64_t size = in_channels * taps;
    for (int64_t i = 0; i < size;) {
      uint64_t eight = 1;
      if (i + 8 <= size) std::memcpy(&eight, row + i, 8);
      const int64_t end = std::min(size, i + 8);
      if (eight == 0) {
        i = end;
        continue;
      }
      for (; i < end; ++i)
        if (row[i]) visit(k, i / taps, i % taps);
    }
  }
}

// The channels of a segment, so that a list holds about 14 kept entries: enough FMAs to hide loading and storing the
// accumulators, few enough channels for the image tile to stay in L1. Measured in benchmarks/NOTES.md.
int64_t segment_channels(int64_t kept, int64_t rows, int64_t channels, int64_t vector) {
  const double per_channel = static_cast<double>(kept) / static_cast<double>(std::max<int64_t>(rows * channels, 1));
  int64_t segment = 16;
  const int64_t limit = vector == 1 ? 64 : 256;
  while (segment < limit && static_cast<double>(segment) * per_channel < 14.0 * static_cast<double>(vector))
    segment *= 2;
  return segment;
}

// Lists for rows that are written `vector` at a time. Rows and channels are numbered within their group; entries carry
// the channel's number in the whole image.
template <class ForEachEntry>
Lists build(int64_t groups, int64_t group_rows, int64_t group_channels, int64_t vector, int64_t segment,
            ForEachEntry for_each_entry) {
  Lists lists{vector, segment, {}, {}};
  const int64_t vectors = (group_rows + vector - 1) / vector;
  const int64_t segments = (group_channels + segment - 1) / segment;
  auto list_of = [&](int64_t group, const Entry& entry) {
    return entry.channel / segment * vectors * groups + group * vectors + entry.row / vector;
  };
  lists.rows.assign(segments * vectors * groups + 1, 0);
  for_each_entry([&](int64_t group, const Entry& entry) {
    if (entry.row % vector == 0) ++lists.rows[list_of(group, entry) + 1];
  });
  for (size_t i = 1; i < lists.rows.size(); ++i) lists.rows[i] += lists.rows[i - 1];
  lists.entries.resize(lists.rows.back());
  std::vector<int32_t> next(lists.rows.begin(), lists.rows.end() - 1);
  for_each_entry([&](int64_t group, const Entry& entry) {
    if (entry.row % vector != 0) return;
    const int64_t channel = group * group_channels + entry.channel;
    lists.entries[next[list_of(group, entry)]++] = static_cast<int32_t>(channel << kTapBits | entry.tap);
  });
  return lists;
}

Int32Array to_array(const std::vector<int32_t>& values) {
  return Int32Array(static_cast<py::ssize_t>(values.size()), values.data());
}

// The widest of 4, 2 and 1 output channels that can be computed together, so that a vector lies in one block and group.
int64_t vector_of(int64_t block, int64_t groups, int64_t group_rows) {
  for (int64_t vector : {4, 2})
    if (block % vector == 0 && (groups == 1 || group_rows % vector == 0)) return vector;
  return 1;
}

py::list compile_pattern(const py::array_t<bool, py::array::c_style>& mask, const std::array<int64_t, 4>& block,
                         int64_t groups) {
  if (mask.ndim() != 4) throw std::invalid_argument("mask must have 4 dimensions");
  const int64_t out_channels = mask.shape(0), in_channels = mask.shape(1), taps = mask.shape(2) * mask.shape(3);
  if (groups < 1 || out_channels % groups != 0) throw std::invalid_argument("groups must divide the mask's rows");
  if (std::ranges::any_of(block, [](int64_t size) { return size < 1; }))
    throw std::invalid_argument("block sizes must be positive");
  if (taps > kMaxTaps || out_channels > kMaxChannels || in_channels * groups > kMaxChannels)
    throw std::invalid_argument("mask is too large");
  const int64_t group_out = out_channels / groups;
  const auto* flags = reinterpret_cast<const uint8_t*>(mask.data());
  auto for_each = [&](auto visit) { for_each_kept(flags, out_channels, in_channels, taps, visit); };
  int64_t kept = 0;
  for_each([&](int64_t, int64_t, int64_t) { ++kept; });

  const int64_t vector = vector_of(block[0], groups, group_out);
  const Lists forward =
      build(groups, group_out, in_channels, vector, segment_channels(kept, out_channels, in_channels, vector),
            [&](auto visit) {
              for_each([&](int64_t k, int64_t c, int64_t tap) { visit(k / group_out, {k % group_out, c, tap}); });
            });
  const int64_t grad_input_vector = vector_of(block[1], groups, in_channels);
  const Lists grad_input =
      build(groups, in_channels, group_out, grad_input_vector,
            segment_channels(kept, in_channels * groups, group_out, grad_input_vector), [&](auto visit) {
              for_each([&](int64_t k, int64_t c, int64_t tap) { visit(k / group_out, {c, k % group_out, tap}); });
            });

  py::array_t<int64_t> header_array(kHeaderSize);
  int64_t* header = header_array.mutable_data();
  std::fill_n(header, static_cast<int>(kHeaderSize), 0);
  header[kFormat] = kPatternFormat;
  header[kOutChannels] = out_channels;
  header[kGroupInChannels] = in_channels;
  header[kFilterRows] = mask.shape(2);
  header[kFilterCols] = mask.shape(3);
  header[kGroups] = groups;
  std::copy_n(block.data(), 4, header + kBlockOut);
  header[kKept] = kept;
  header[kVector] = vector;
  header[kSegmentChannels] = forward.segment_channels;
  header[kGradInputVector] = grad_input_vector;
  header[kGradInputSegmentChannels] = grad_input.segment_channels;
  py::list pattern;
  pattern.append(header_array);
  pattern.append(mask);
  for (const Lists* lists : {&forward, &grad_input}) {
    pattern.append(to_array(lists->rows));
    pattern.append(to_array(lists->entries));
  }
  return pattern;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Pattern compiler, instruction set and build facts of sparse_adv.";
  m.def("compile_pattern", &compile_pattern, py::arg("mask"), py::arg("block"), py::arg("groups") = 1,
        "The arrays of pattern_layout.h for a mask [K, C/groups, R, S]: header, mask, rows, entries, rows, entries.");
  m.def(
      "cpu_capability", [] { return name_of(cpu_capability()); },
      "The instruction set in use: portable, avx2 or avx512.");
  m.attr("header_fields") =
      py::dict(py::arg("groups") = static_cast<int>(kGroups), py::arg("block") = static_cast<int>(kBlockOut),
               py::arg("kept") = static_cast<int>(kKept), py::arg("path") = static_cast<int>(kForwardPath),
               py::arg("weight_is_masked") = static_cast<int>(kWeightIsMasked));
  m.attr("version") = SPARSE_ADV_VERSION;
  m.attr("compiler") = SPARSE_ADV_COMPILER;
}
