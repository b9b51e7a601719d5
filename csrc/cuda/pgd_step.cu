#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/layout.h"
#include "common/pgd_checks.h"
#include "cuda/launch.h"
#include "cuda/pgd_step_kernel.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

// One block per image. Its threads keep up to kCachedBytes each in registers between the sums and the move; with more,
// registers spill to memory. Larger images (more than 8,192 float32 elements) are read twice: 28 bytes per element
// instead of 16. The limit of vectors, for those of one element, is chosen, not tuned.
constexpr int kImageThreads = 512;
constexpr int kCachedBytes = 192;
constexpr int kMostCached = 8;

template <int V, class Image, class Grad>
__global__ void __launch_bounds__(kThreads) pgd_step_linf(PgdStep<Image, Grad> step, int64_t count) {
  pgd_step_linf_thread<V>(step, count, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

template <int V, int kCached, class Image, class Grad>
__global__ void __launch_bounds__(kImageThreads) pgd_step_l2(PgdStep<Image, Grad> step, int64_t count) {
  StepThread<kImageThreads, V, kCached, Image, Grad> thread{
      .step = step, .image = blockIdx.x * count, .count = count, .thread = static_cast<int>(threadIdx.x), .cached = {}};
  const StepSums thread_sums = thread.add();
  double sums[3] = {thread_sums.gg, thread_sums.dg, thread_sums.dd};
  block_sums<kImageThreads>(sums);
  thread.move(step_scales({sums[0], sums[1], sums[2]}, step.alpha, step.eps));
}

template <int V, class Image, class Grad>
void launch_l2(const PgdStep<Image, Grad>& step, int64_t images, int64_t count, cudaStream_t stream) {
  constexpr int kCached = std::min(kMostCached, kCachedBytes / static_cast<int>(sizeof(StepVector<V, Image, Grad>)));
  const auto kernel =
      count <= kCached * kImageThreads * V ? &pgd_step_l2<V, kCached, Image, Grad> : &pgd_step_l2<V, 0, Image, Grad>;
  kernel<<<static_cast<unsigned>(images), kImageThreads, 0, stream>>>(step, count);
}

template <class Image, class Grad>
void launch(const Tensor& adv, const Tensor& grad, const Tensor& clean, const Tensor& out, const double (&sizes)[4],
            bool l2) {
  const PgdStep<Image, Grad> step{.adv = adv.const_data_ptr<Image>(),
                                  .grad = grad.const_data_ptr<Grad>(),
                                  .clean = clean.const_data_ptr<Image>(),
                                  .out = out.mutable_data_ptr<Image>(),
                                  .alpha = sizes[0],
                                  .eps = sizes[1],
                                  .lo = sizes[2],
                                  .hi = sizes[3]};
  constexpr int V = kVector<Image, Grad>;
  const bool aligned = is_aligned(step.adv) && is_aligned(step.grad) && is_aligned(step.clean) && is_aligned(step.out);
  const cudaStream_t stream = current_stream(out);
  const int64_t count = out.numel();
  if (!l2) {
    const int64_t threads = aligned ? pgd_step_linf_threads<V>(count) : count;
    const auto kernel = aligned ? &pgd_step_linf<V, Image, Grad> : &pgd_step_linf<1, Image, Grad>;
    kernel<<<blocks_for(threads), kThreads, 0, stream>>>(step, count);
  } else {
    const int64_t images = out.dim() == 0 ? 1 : out.size(0), each = count / images;
    check(images <= INT32_MAX, "a batch of ", images, " images is too large for one launch");
    if (aligned && each % V == 0)
      launch_l2<V>(step, images, each, stream);
    else
      launch_l2<1>(step, images, each, stream);
  }
  check_launch("pgd_step");
}

template <class Image>
void launch_grad(const Tensor& adv, const Tensor& grad, const Tensor& clean, const Tensor& out,
                 const double (&sizes)[4], bool l2) {
  with_type_of(grad, [&](auto zero) { launch<Image, decltype(zero)>(adv, grad, clean, out, sizes, l2); });
}

void launch_image(const Tensor& adv, const Tensor& grad, const Tensor& clean, const Tensor& out,
                  const double (&sizes)[4], bool l2) {
  with_type_of(out, [&](auto zero) { launch_grad<decltype(zero)>(adv, grad, clean, out, sizes, l2); });
}

void step_into(Tensor& out, const Tensor& adv, const Tensor& grad, const Tensor& clean, const double (&sizes)[4],
               bool l2) {
  if (out.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const bool writable = has_plain_layout(out);
  const Tensor moved =
      writable ? out : torch::stable::empty(out.sizes(), out.scalar_type(), std::nullopt, out.device());
  launch_image(in_layout_of(moved, adv), in_layout_of(moved, grad), in_layout_of(moved, clean), moved, sizes, l2);
  if (!writable) torch::stable::copy_(out, moved);
}

Tensor pgd_step_cuda(Tensor adv, Tensor grad, Tensor clean, double alpha, double eps, bool l2, double lo, double hi) {
  check_step(adv, grad, clean);
  Tensor out = torch::stable::empty_like(adv);
  step_into(out, adv, grad, clean, {alpha, eps, lo, hi}, l2);
  return out;
}

void pgd_step_inplace_cuda(Tensor adv, Tensor grad, Tensor clean, double alpha, double eps, bool l2, double lo,
                           double hi) {
  check_step(adv, grad, clean);
  step_into(adv, adv, grad, clean, {alpha, eps, lo, hi}, l2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CUDA, m) {
  m.impl("pgd_step", SPARSE_ADV_BOX(&pgd_step_cuda));
  m.impl("pgd_step_", SPARSE_ADV_BOX(&pgd_step_inplace_cuda));
}

}  // namespace sparse_adv
