// Runs the bodies of the CUDA kernels on the host, one thread after the other. Launches and sums over a block are not
// tested: this file has loops in their place. test_cuda_on_host.py compiles it and calls it.
#include <type_traits>
#include <vector>

#include "cuda/pgd_step_kernel.h"
#include "cuda/pgd_step_normalized_kernel.h"
#include "cuda/random_start_kernel.h"

namespace {

using namespace sparse_adv;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls visit(T{}) with the C++ type T of a dtype. test_cuda_on_host.py numbers the dtypes in the same way.
template <class Visit>
void with_type(int dtype, Visit visit) {
  dtype == 0 ? visit(float{}) : dtype == 1 ? visit(double{}) : dtype == 2 ? visit(BFloat16{}) : visit(Half{});
}

template <int V, class Image, class Grad>
void linf(const PgdStep<Image, Grad>& step, int64_t count) {
  for (int64_t thread = 0; thread < pgd_step_linf_threads<V>(count); ++thread)
    pgd_step_linf_thread<V>(step, count, thread);
}

template <int V, int kCached, class Image, class Grad>
void l2(const PgdStep<Image, Grad>& step, int64_t images, int64_t count) {
  constexpr int kThreads = 32;
  using Thread = StepThread<kThreads, V, kCached, Image, Grad>;
  for (int64_t image = 0; image < images; ++image) {
    std::vector<Thread> threads;
    StepSums sums{};
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.push_back(Thread{.step = step, .image = image * count, .count = count, .thread = thread, .cached = {}});
      const StepSums thread_sums = threads.back().add();
      sums = {sums.gg + thread_sums.gg, sums.dg + thread_sums.dg, sums.dd + thread_sums.dd};
    }
    for (Thread& thread : threads) thread.move(step_scales(sums, step.alpha, step.eps));
  }
}

}  // namespace

extern "C" {

// `cached`: -1 for linf, else the number of vectors that a thread of the l2 kernel keeps in registers. Returns the
// length of a vector.
int host_pgd_step(int image_dtype, int grad_dtype, bool aligned, int cached, const void* adv, const void* grad,
                  const void* clean, void* out, int64_t images, int64_t count, const double* sizes) {
  int vector = 1;
  with_type(image_dtype, [&](auto image) {
    with_type(grad_dtype, [&](auto slope) {
      using Image = decltype(image);
      using Grad = decltype(slope);
      constexpr int V = kVector<Image, Grad>;
      const PgdStep<Image, Grad> step{.adv = static_cast<const Image*>(adv),
                                      .grad = static_cast<const Grad*>(grad),
                                      .clean = static_cast<const Image*>(clean),
                                      .out = static_cast<Image*>(out),
                                      .alpha = sizes[0],
                                      .eps = sizes[1],
                                      .lo = sizes[2],
                                      .hi = sizes[3]};
      vector = aligned ? V : 1;
      if (cached < 0)
        aligned ? linf<V>(step, images * count) : linf<1>(step, images * count);
      else if (cached == 0)
        aligned ? l2<V, 0>(step, images, count) : l2<1, 0>(step, images, count);
      else
        aligned ? l2<V, 4>(step, images, count) : l2<1, 4>(step, images, count);
    });
  });
  return vector;
}

void host_pgd_step_normalized(int grad_dtype, bool channels_last, const float* adv, const void* grad,
                              const float* clean, float* out, const float* mean, const float* std, void* normalized,
                              int64_t images, int64_t channels, int64_t area, const double* sizes) {
  with_type(grad_dtype, [&](auto slope) {
    using Grad = decltype(slope);
    const PgdStep<float, Grad> step{.adv = adv,
                                    .grad = static_cast<const Grad*>(grad),
                                    .clean = clean,
                                    .out = out,
                                    .alpha = sizes[0],
                                    .eps = sizes[1],
                                    .lo = sizes[2],
                                    .hi = sizes[3]};
    const NormalizedStep<Grad> normalized_step{.step = step,
                                               .mean = mean,
                                               .std = std,
                                               .normalized = static_cast<BFloat16*>(normalized),
                                               .channels = channels,
                                               .area = area,
                                               .channels_last = channels_last};
    for (int64_t pixel = 0; pixel < images * area; ++pixel) pgd_step_normalized_pixel(normalized_step, pixel);
  });
}

void host_random_start(int dtype, bool aligned, bool is_l2, const void* clean, void* out, int64_t images, int64_t count,
                       const int64_t* seed, const double* sizes) {
  const auto key = static_cast<uint64_t>(seed[0]), offset = static_cast<uint64_t>(seed[1]);
  with_type(dtype, [&](auto image) {
    using Image = decltype(image);
    const RandomStart<Image> start{.clean = static_cast<const Image*>(clean),
                                   .out = static_cast<Image*>(out),
                                   .eps = sizes[0],
                                   .lo = sizes[1],
                                   .hi = sizes[2]};
    const int64_t total = images * count;
    constexpr int kThreads = 32;
    if (!is_l2) {
      for (int64_t block = 0; 4 * block < total; ++block)
        aligned ? random_start_linf_thread<4>(start, total, block, key, offset)
                : random_start_linf_thread<1>(start, total, block, key, offset);
      return;
    }
    for (int64_t sample = 0; sample < images; ++sample) {
      double sum = 0;
      const auto thread = [&](int i) {
        return StartThread<Image>{.start = start,
                                  .sample = sample,
                                  .count = count,
                                  .thread = i,
                                  .threads = kThreads,
                                  .key = key,
                                  .offset = offset};
      };
      for (int i = 0; i < kThreads; ++i) sum += thread(i).sum_of_squares();
      for (int i = 0; i < kThreads; ++i) thread(i).move(sum);
    }
  });
}
}
