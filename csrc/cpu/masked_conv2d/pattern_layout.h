// The layout of a compiled pattern, shared by its maker (host.cpp) and its readers (cpu/pattern.cpp).
//
// A pattern is a list of tensors, none of which knows an image size:
//   0 header   int64 [kHeaderSize], on the CPU
//   1 mask     bool [K, C/groups, R, S]: true = kept
//   2 rows     int32 [segments * vectors + 1]: where each list starts in `entries`; the forward pass and grad_weight
//   3 entries  int32: the kept (channel, tap) pairs, channel << kTapBits | tap, tap = r * S + s
//   4, 5       the same for grad_input, whose channels are output channels
//   6, 7       optional, float32 [entries * vector]: the weight's values in the order of 3 and of 5
//
// The forward pass computes `vector` consecutive output channels at a time (1, 2 or 4: what the block shape allows),
// all of which keep the same (channel, tap) pairs: that is where a block mask is faster than an unstructured one.
// Lists are cut into segments of consecutive channels, so that the part of the image that a segment reads stays in L1.
// List number = segment * vectors + vector; entries within one list ascend by channel, then tap.
#pragma once

#include <cstdint>

namespace sparse_adv {

enum PatternTensor { kHeader, kMask, kRows, kEntries, kGradInputRows, kGradInputEntries, kValues, kGradInputValues };

enum HeaderField {
  kFormat,  // kPatternFormat
  kOutChannels,
  kGroupInChannels,
  kFilterRows,
  kFilterCols,
  kGroups,
  kBlockOut,
  kBlockIn,
  kBlockRows,
  kBlockCols,
  kKept,  // number of true elements of the mask
  kVector,
  kSegmentChannels,
  kGradInputVector,
  kGradInputSegmentChannels,
  kForwardKernel,  // the Kernel requested for each pass
  kGradInputKernel,
  kGradWeightKernel,
  kWeightIsMasked,  // 1: the caller guarantees that `weight` is 0 where the mask is false
  kHeaderSize
};

enum class Kernel : int64_t { automatic = 0, sparse = 1, dense = 2 };

constexpr int64_t kPatternFormat = 1;  // 2 is that of the GPU's block lists, which ops/pattern.py makes and reads
constexpr int kTapBits = 12;
constexpr int64_t kMaxTaps = int64_t{1} << kTapBits;
constexpr int64_t kMaxChannels = int64_t{1} << (31 - kTapBits);

}  // namespace sparse_adv
