// Shared by all launchers: the caller's stream, launch sizes, errors, dispatch on dtypes, and sums over a block.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/errors.h"
#include "common/rounding.h"

namespace sparse_adv {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
        "no CUDA stream for device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

// The number of blocks that have at least `threads` threads together.
inline unsigned blocks_for(int64_t threads) {
  const int64_t blocks = divide_up(threads, kThreads);
  check(blocks <= INT32_MAX, "a batch of ", threads, " threads is too large for one launch");
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Calls visit(T{}) with the C++ type T of the tensor's dtype, one of those that check_floating allows.
template <class Visit>
void with_type_of(const torch::stable::Tensor& tensor, Visit visit) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return visit(float{});
    case torch::headeronly::ScalarType::Double:
      return visit(double{});
    case torch::headeronly::ScalarType::BFloat16:
      return visit(torch::headeronly::BFloat16{});
    default:
      return visit(torch::headeronly::Half{});
  }
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Replaces N numbers of each thread of a block by their sums over all its threads. The order of summation depends on
// the number of threads alone. At most one call per kernel: nothing waits before `warps` is written again.
template <int kBlock, int N>
__device__ void block_sums(double (&values)[N]) {
  __shared__ double warps[kBlock / kWarp][N];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int n = 0; n < N; ++n)
    for (int step = kWarp / 2; step > 0; step /= 2) values[n] += __shfl_xor_sync(~0u, values[n], step);
  if (lane == 0)
    for (int n = 0; n < N; ++n) warps[warp][n] = values[n];
  __syncthreads();
  for (int n = 0; n < N; ++n) {
    values[n] = 0;
    for (int w = 0; w < kBlock / kWarp; ++w) values[n] += warps[w][n];
  }
}

}  // namespace sparse_adv
