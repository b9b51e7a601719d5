// The memory layout of a compiled pattern, shared by the compiler (host/pattern_compiler.cpp) and the reader
// (cpu/masked_conv2d/pattern.cpp).
//
// A pattern is a list of tensors. None of them depends on an image size.
//   0 header       int64 [kHeaderSize], on the CPU
//   1 mask         bool [K, C/groups, R, S]: true = kept
//   2 row_offsets  int32 [ic_blocks * oc_blocks + 1]  } a block-CSR matrix, for the forward pass and grad_weight
//   3 col_indices  int32 [nnz]                        }
//   4, 5           the same two for grad_input, which reads output channels and writes input channels
//   6, 7           optional, float32 [nnz, oc_block]: the weight's values in the order of 3 and of 5
//
// A column index names a channel that the pass reads and a filter tap: channel << kTapBits | tap, tap = r * S + s. It
// stands for `oc_block` weights: those of 1, 2 or 4 consecutive channels that the pass writes, all of which the mask
// keeps or prunes together (the block shape decides how many these are). The kernels load an input vector once for all
// of them, which is why block masks run faster than unstructured ones.
//
// The channels that the pass reads are cut into blocks of `ic_block` consecutive channels, so that the part of the
// images that one block reads stays in the L1 cache. Row number = ic_block number * oc_blocks + oc_block number: the
// matrix has a row for each pair of these blocks. The column indices of a row ascend if oc_block is 1.
// Otherwise they are sorted by filter row first, so that the kernel can leave out those that read padding.
#pragma once

#include <cstdint>

namespace sparse_adv {

enum PatternTensor {
  kHeader,
  kMask,
  kRowOffsets,
  kColIndices,
  kGradInputRowOffsets,
  kGradInputColIndices,
  kValues,
  kGradInputValues
};

enum HeaderField {
  kFormat,  // kPatternFormat
  kOutChannels,
  kGroupInChannels,
  kFilterRows,
  kFilterCols,
  kGroups,
  kBlockOut,  // the mask's block shape, 4 fields
  kBlockIn,
  kBlockRows,
  kBlockCols,
  kKeptWeights,  // number of true elements of the mask
  kOcBlock,
  kIcBlock,
  kGradInputOcBlock,
  kGradInputIcBlock,
  kForwardKernel,  // the Kernel requested for each pass, 3 fields
  kGradInputKernel,
  kGradWeightKernel,
  kWeightIsMasked,  // 1: the caller guarantees that `weight` is 0 where the mask is false
  kHeaderSize
};

enum class Kernel : int64_t { automatic = 0, sparse = 1, dense = 2 };

constexpr int64_t kPatternFormat = 1;  // 2 is the block format of the GPU kernels (sparse_adv/ops)
constexpr int kTapBits = 12;
constexpr int64_t kMaxTaps = int64_t{1} << kTapBits;
constexpr int64_t kMaxChannels = int64_t{1} << (31 - kTapBits);

}  // namespace sparse_adv
