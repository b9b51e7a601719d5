#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/layout.h"
#include "common/pgd_checks.h"
#include "cuda/launch.h"
#include "cuda/pgd_step_normalized_kernel.h"

namespace sparse_adv {

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Grad>
__global__ void __launch_bounds__(kThreads) pgd_step_normalized(NormalizedStep<Grad> step, int64_t pixels) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel < pixels) pgd_step_normalized_pixel(step, pixel);
}

std::tuple<Tensor, Tensor> pgd_step_normalized_cuda(Tensor adv, Tensor grad, Tensor clean, Tensor mean, Tensor std,
                                                    double alpha, double eps, double lo, double hi) {
  check_step(adv, grad, clean);
  check(adv.dim() == 4, "pgd_step_normalized: images must be [N, C, H, W]");
  check(adv.scalar_type() == ScalarType::Float && clean.scalar_type() == ScalarType::Float,
        "pgd_step_normalized: images must be float32");
  const int64_t N = adv.size(0), C = adv.size(1), area = adv.size(2) * adv.size(3);
  for (const Tensor& statistic : {mean, std}) {
    check_floating("mean and std", statistic, adv);
    check(statistic.scalar_type() == ScalarType::Float && statistic.numel() == C && statistic.is_contiguous(),
          "pgd_step_normalized: mean and std must have one float32 number per channel");
  }
  const torch::stable::accelerator::DeviceGuard guard(adv.get_device_index());
  const Tensor source = in_plain_layout(adv);
  Tensor out = torch::stable::empty_like(source);
  Tensor normalized = torch::stable::empty(adv.sizes(), ScalarType::BFloat16, std::nullopt, adv.device(), std::nullopt,
                                           MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return {out, normalized};
  const Tensor slope = in_layout_of(source, grad), centre = in_layout_of(source, clean);
  with_type_of(slope, [&](auto zero) {
    using Grad = decltype(zero);
    const PgdStep<float, Grad> step{.adv = source.const_data_ptr<float>(),
                                    .grad = slope.const_data_ptr<Grad>(),
                                    .clean = centre.const_data_ptr<float>(),
                                    .out = out.mutable_data_ptr<float>(),
                                    .alpha = alpha,
                                    .eps = eps,
                                    .lo = lo,
                                    .hi = hi};
    const NormalizedStep<Grad> normalized_step{.step = step,
                                               .mean = mean.const_data_ptr<float>(),
                                               .std = std.const_data_ptr<float>(),
                                               .normalized = normalized.mutable_data_ptr<BFloat16>(),
                                               .channels = C,
                                               .area = area,
                                               .channels_last = is_channels_last(source)};
    pgd_step_normalized<<<blocks_for(N * area), kThreads, 0, current_stream(out)>>>(normalized_step, N * area);
  });
  check_launch("pgd_step_normalized");
  return {out, normalized};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CUDA, m) {
  m.impl("pgd_step_normalized", SPARSE_ADV_BOX(&pgd_step_normalized_cuda));
}

}  // namespace sparse_adv
