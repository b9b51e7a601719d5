// The PGD step on dense memory, the work of one thread. adv, grad, clean and out have the same layout; out may be adv.
#pragma once

#include <cmath>

#include "cuda/vectors.h"

namespace sparse_adv {

template <class Image, class Grad>
struct PgdStep {
  const Image* adv;
  const Grad* grad;
  const Image* clean;
  Image* out;
  double alpha, eps, lo, hi;
};

// One element. alpha * sign is exact, so contraction into an FMA does not change the result.
template <class Image, class Grad>
SPARSE_ADV_DEVICE Image moved_linf(const PgdStep<Image, Grad>& step, Image adv, Grad grad, Image clean) {
  using T = Compute<Image>;
  const T alpha = static_cast<T>(step.alpha), eps = static_cast<T>(step.eps);
  const auto slope = static_cast<Compute<Grad>>(grad);
  const T sign = static_cast<T>(slope > 0) - static_cast<T>(slope < 0);
  const T centre = static_cast<T>(clean);
  const T moved = clamped(static_cast<T>(adv) + alpha * sign, centre - eps, centre + eps);
  // Comparisons with NaN are false, so the clamps would ignore a NaN in clean: it is copied explicitly.
  return centre == centre ? static_cast<Image>(clamped(moved, static_cast<T>(step.lo), static_cast<T>(step.hi)))
                          : clean;
}

// Elements [first, first + V).
template <int V, class Image, class Grad>
SPARSE_ADV_DEVICE void pgd_step_linf_vector(const PgdStep<Image, Grad>& step, int64_t first) {
  Vector<Image, V> adv, clean;
  Vector<Grad, V> grad;
  adv.load(step.adv + first);
  grad.load(step.grad + first);
  clean.load(step.clean + first);
  for (int i = 0; i < V; ++i) adv.at[i] = moved_linf(step, adv.at[i], grad.at[i], clean.at[i]);
  adv.store(step.out + first);
}

// The first threads compute one vector each, the others one of the remaining elements each.
template <int V>
SPARSE_ADV_DEVICE int64_t pgd_step_linf_threads(int64_t count) {
  return count / V + count % V;
}

template <int V, class Image, class Grad>
SPARSE_ADV_DEVICE void pgd_step_linf_thread(const PgdStep<Image, Grad>& step, int64_t count, int64_t thread) {
  const int64_t vectors = count / V;
  if (thread < vectors)
    pgd_step_linf_vector<V>(step, thread * V);
  else if (thread < pgd_step_linf_threads<V>(count))
    pgd_step_linf_vector<1>(step, vectors * V + thread - vectors);
}

// Sums over one image that are needed before its pixels can be moved: gg = |g|^2, dg = <d, g> and dd = |d|^2, where g
// is the gradient and d = adv - clean. The new distance follows from them, |d + rate g|^2 = dd + 2 rate dg + rate^2 gg,
// so the image need not be read again for it.
struct StepSums {
  double gg, dg, dd;
};

struct StepScales {
  double rate, shrink;
};

SPARSE_ADV_DEVICE StepScales step_scales(const StepSums& sums, double alpha, double eps) {
  const double rate = sums.gg > 0 ? alpha / sqrt(sums.gg) : 0.0;
  const double square = sums.dd + 2 * rate * sums.dg + rate * rate * sums.gg;
  const double distance = sqrt(square < 0 ? 0.0 : square);  // rounding can make it negative; NaN stays NaN
  return {rate, distance <= eps ? 1.0 : eps / distance};
}

// V elements of one image, in registers between the sums and the move.
template <int V, class Image, class Grad>
struct StepVector {
  using T = Compute<Image>;

  Vector<Image, V> adv, clean;
  Vector<Grad, V> grad;

  // Elements that are not finite count as 0. Otherwise one overflow would make the norm infinite, and the image would
  // not move.
  SPARSE_ADV_DEVICE double slope(int i) const {
    const auto g = static_cast<Compute<Grad>>(grad.at[i]);
    return g - g == 0 ? static_cast<double>(g) : 0.0;
  }

  SPARSE_ADV_DEVICE void load(const PgdStep<Image, Grad>& step, int64_t first) {
    adv.load(step.adv + first);
    grad.load(step.grad + first);
    clean.load(step.clean + first);
  }

  SPARSE_ADV_DEVICE void add_to(StepSums& sums) const {
    for (int i = 0; i < V; ++i) {
      const double g = slope(i), d = static_cast<double>(adv.at[i]) - static_cast<double>(clean.at[i]);
      sums.gg += g * g;
      sums.dg += d * g;
      sums.dd += d * d;
    }
  }

  SPARSE_ADV_DEVICE void move(const PgdStep<Image, Grad>& step, const StepScales& scales, int64_t first) {
    const T lo = static_cast<T>(step.lo), hi = static_cast<T>(step.hi);
    for (int i = 0; i < V; ++i) {
      const double centre = static_cast<double>(clean.at[i]);
      // Rounded before the projection, as in the CPU kernel.
      const T moved = static_cast<T>(static_cast<double>(adv.at[i]) + scales.rate * slope(i));
      const double offset = static_cast<double>(moved) - centre;
      const T projected = scales.shrink == 1.0 ? moved : static_cast<T>(centre + scales.shrink * offset);
      adv.at[i] = static_cast<Image>(clamped(projected, lo, hi));
    }
    adv.store(step.out + first);
  }
};

// One of the `kThreads` threads of an image of `count` elements, a multiple of V, that begins at element `image`. Up to
// kCached vectors stay in registers between the sums and the move; with kCached = 0 the image is read twice.
template <int kThreads, int V, int kCached, class Image, class Grad>
struct StepThread {
  const PgdStep<Image, Grad>& step;
  int64_t image, count;
  int thread;
  StepVector<V, Image, Grad> cached[kCached > 0 ? kCached : 1];

  SPARSE_ADV_DEVICE StepSums add() {
    StepSums sums{};
    if constexpr (kCached == 0) {
      for (int64_t first = first_of(0); first < count; first += int64_t{kThreads} * V) {
        cached[0].load(step, image + first);
        cached[0].add_to(sums);
      }
    } else {
      SPARSE_ADV_UNROLL
      for (int i = 0; i < kCached; ++i)
        if (first_of(i) < count) {
          cached[i].load(step, image + first_of(i));
          cached[i].add_to(sums);
        }
    }
    return sums;
  }

  SPARSE_ADV_DEVICE void move(const StepScales& scales) {
    if constexpr (kCached == 0) {
      for (int64_t first = first_of(0); first < count; first += int64_t{kThreads} * V) {
        cached[0].load(step, image + first);
        cached[0].move(step, scales, image + first);
      }
    } else {
      SPARSE_ADV_UNROLL
      for (int i = 0; i < kCached; ++i)
        if (first_of(i) < count) cached[i].move(step, scales, image + first_of(i));
    }
  }

  SPARSE_ADV_DEVICE int64_t first_of(int i) const { return (int64_t{kThreads} * i + thread) * V; }
};

}  // namespace sparse_adv
