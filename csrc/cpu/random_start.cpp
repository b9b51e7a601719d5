#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/errors.h"
#include "common/parallel.h"
#include "common/pgd_checks.h"
#include "cpu/random_start_kernel.h"
#include "cpu/staging.h"

namespace sparse_adv {

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = kElementwiseGrain / 4;  // elements per thread at least: each takes about 20 operations

template <class T>
void run(const Tensor& clean, const Tensor& out, const Noise& noise, bool l2) {
  const T* clean_data = clean.const_data_ptr<T>();
  T* out_data = out.mutable_data_ptr<T>();
  if (!l2) {
    const auto kernel = SPARSE_ADV_CHOOSE(random_start_linf<T>);
    parallel_for(0, out.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { kernel(clean_data, out_data, begin, end, noise); });
    return;
  }
  const auto kernel = SPARSE_ADV_CHOOSE(random_start_l2<T>);
  const int64_t samples = out.dim() == 0 ? 1 : out.size(0), count = out.numel() / samples;
  parallel_for(0, samples, std::max<int64_t>(1, kGrain / count), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) kernel(clean_data, out_data, n, count, noise);
  });
}

Tensor random_start_cpu(Tensor clean, Tensor seed, double eps, bool l2, double lo, double hi) {
  check_start(clean, seed);
  Tensor out = torch::stable::empty_like(clean);
  if (out.numel() == 0) return out;
  const int64_t* philox_state = seed.const_data_ptr<int64_t>();
  const Noise noise{.key = static_cast<uint64_t>(philox_state[0]),
                    .offset = static_cast<uint64_t>(philox_state[seed.stride(0)]),
                    .eps = eps,
                    .lo = lo,
                    .hi = hi};
  // Elements are numbered in NCHW order, so that the noise does not depend on the layout of the images.
  const Tensor staging = staging_for(out, out.is_contiguous());
  const auto start = is_double(staging) ? &run<double> : &run<float>;
  start(staged(clean, staging), staging, noise, l2);
  unstage(staging, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) { m.impl("random_start", SPARSE_ADV_BOX(&random_start_cpu)); }

}  // namespace sparse_adv
