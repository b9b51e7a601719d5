#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/pgd_checks.h"
#include "cuda/launch.h"
#include "cuda/random_start_kernel.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

// The kernels read key and offset from device memory. So a replayed CUDA graph draws new numbers if they have changed,
// and the host does not wait for the device.
struct Seed {
  const int64_t* philox_state;
  int64_t stride;
  __device__ uint64_t key() const { return static_cast<uint64_t>(philox_state[0]); }
  __device__ uint64_t offset() const { return static_cast<uint64_t>(philox_state[stride]); }
};

template <int V, class Image>
__global__ void __launch_bounds__(kThreads) random_start_linf(RandomStart<Image> start, Seed seed, int64_t count) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (4 * block < count) random_start_linf_thread<V>(start, count, block, seed.key(), seed.offset());
}

// One block per image.
template <class Image>
__global__ void __launch_bounds__(kThreads) random_start_l2(RandomStart<Image> start, Seed seed, int64_t count) {
  const StartThread<Image> thread{.start = start,
                                  .sample = blockIdx.x,
                                  .count = count,
                                  .thread = static_cast<int>(threadIdx.x),
                                  .threads = kThreads,
                                  .key = seed.key(),
                                  .offset = seed.offset()};
  double sum[1] = {thread.sum_of_squares()};
  block_sums<kThreads>(sum);
  thread.move(sum[0]);
}

template <class Image>
void launch(const Tensor& clean, const Seed& seed, const Tensor& out, double eps, double lo, double hi, bool l2) {
  const RandomStart<Image> start{
      .clean = clean.const_data_ptr<Image>(), .out = out.mutable_data_ptr<Image>(), .eps = eps, .lo = lo, .hi = hi};
  const cudaStream_t stream = current_stream(out);
  const int64_t count = out.numel();
  if (!l2) {
    const auto kernel = is_aligned(start.clean) ? &random_start_linf<4, Image> : &random_start_linf<1, Image>;
    kernel<<<blocks_for((count + 3) / 4), kThreads, 0, stream>>>(start, seed, count);
  } else {
    const int64_t samples = out.dim() == 0 ? 1 : out.size(0);
    check(samples <= INT32_MAX, "a batch of ", samples, " images is too large for one launch");
    random_start_l2<<<static_cast<unsigned>(samples), kThreads, 0, stream>>>(start, seed, count / samples);
  }
  check_launch("random_start");
}

Tensor random_start_cuda(Tensor clean, Tensor seed, double eps, bool l2, double lo, double hi) {
  check_start(clean, seed);
  Tensor out = torch::stable::empty_like(clean);
  if (out.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  // Elements are numbered in NCHW order, so that the noise does not depend on the layout of the images.
  const Tensor source = torch::stable::contiguous(clean);
  const Tensor moved = out.is_contiguous() ? out : torch::stable::empty_like(source);
  const Seed state{seed.const_data_ptr<int64_t>(), seed.stride(0)};
  with_type_of(out, [&](auto zero) { launch<decltype(zero)>(source, state, moved, eps, lo, hi, l2); });
  if (!out.is_contiguous()) torch::stable::copy_(out, moved);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CUDA, m) { m.impl("random_start", SPARSE_ADV_BOX(&random_start_cuda)); }

}  // namespace sparse_adv
