#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/errors.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/pgd_checks.h"
#include "cpu/pgd_step_kernel.h"
#include "cpu/staging.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

template <class T>
void run(const Tensor& adv, const Tensor& grad, const Tensor& clean, const Tensor& out, const StepSizes& sizes,
         bool l2) {
  const T* adv_data = adv.const_data_ptr<T>();
  const T* grad_data = grad.const_data_ptr<T>();
  const T* clean_data = clean.const_data_ptr<T>();
  T* out_data = out.mutable_data_ptr<T>();
  if (!l2) {
    const auto kernel = SPARSE_ADV_CHOOSE(pgd_step_linf<T>);
    parallel_for(0, out.numel(), kElementwiseGrain, [&](int64_t begin, int64_t end) {
      kernel(adv_data + begin, grad_data + begin, clean_data + begin, out_data + begin, end - begin, sizes);
    });
    return;
  }
  const auto kernel = SPARSE_ADV_CHOOSE(pgd_step_l2<T>);
  const int64_t samples = out.dim() == 0 ? 1 : out.size(0), count = out.numel() / samples;
  parallel_for(0, samples, std::max<int64_t>(1, kElementwiseGrain / count), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * count;
    kernel(adv_data + first, grad_data + first, clean_data + first, out_data + first, end - begin, count, sizes);
  });
}

void step_into(Tensor& out, const Tensor& adv, const Tensor& grad, const Tensor& clean, const StepSizes& sizes,
               bool l2) {
  if (out.numel() == 0) return;
  // In both plain layouts an image is one contiguous piece of memory, which the l2 norm needs.
  const Tensor staging = staging_for(out, has_plain_layout(out));
  Tensor centre = staged(clean, staging);
  if (l2 && centre.const_data_ptr() == staging.const_data_ptr()) {
    // adv is clean, which the kernel reads again after it has written: that needs a copy.
    Tensor copy = torch::stable::empty_like(staging);
    centre = torch::stable::copy_(copy, clean);
  }
  const auto step = is_double(staging) ? &run<double> : &run<float>;
  step(staged(adv, staging), staged(grad, staging), centre, staging, sizes, l2);
  unstage(staging, out);
}

Tensor pgd_step_cpu(Tensor adv, Tensor grad, Tensor clean, double alpha, double eps, bool l2, double lo, double hi) {
  check_step(adv, grad, clean);
  Tensor out = torch::stable::empty_like(adv);
  step_into(out, adv, grad, clean, {alpha, eps, lo, hi}, l2);
  return out;
}

void pgd_step_inplace_cpu(Tensor adv, Tensor grad, Tensor clean, double alpha, double eps, bool l2, double lo,
                          double hi) {
  check_step(adv, grad, clean);
  step_into(adv, adv, grad, clean, {alpha, eps, lo, hi}, l2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) {
  m.impl("pgd_step", SPARSE_ADV_BOX(&pgd_step_cpu));
  m.impl("pgd_step_", SPARSE_ADV_BOX(&pgd_step_inplace_cpu));
}

}  // namespace sparse_adv
