// The PGD step on dense memory, as one thread sees it. adv, grad, clean and out lie alike; out may be adv.
#pragma once

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

// One element. alpha * sign is exact, so contraction into an FMA changes no bit.
template <class Image, class Grad>
SPARSE_ADV_DEVICE Image moved_linf(const PgdStep<Image, Grad>& step, Image adv, Grad grad, Image clean) {
  using T = Compute<Image>;
  const T alpha = static_cast<T>(step.alpha), eps = static_cast<T>(step.eps);
  const auto slope = static_cast<Compute<Grad>>(grad);
  const T sign = static_cast<T>(slope > 0) - static_cast<T>(slope < 0);
  const T centre = static_cast<T>(clean);
  const T moved = clamped(static_cast<T>(adv) + alpha * sign, centre - eps, centre + eps);
  // Comparisons with a NaN bound let every value pass, so a NaN in clean is carried over by hand.
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

// The first threads take a vector each, the others one element each of what is left.
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

// What one image's threads add up before any of them can move its pixels, with g the gradient and d = adv - clean. The
// new distance follows from these, |d + rate g|^2 = dd + 2 rate dg + rate^2 gg, so that one look at the image is
// enough.
struct StepSums {
  double gg, dg, dd;
};

struct StepScales {
  double rate, shrink;
};

SPARSE_ADV_DEVICE StepScales step_scales(const StepSums& sums, double alpha, double eps) {
  const double rate = sums.gg > 0 ? alpha / sqrt(sums.gg) : 0.0;
  const double square = sums.dd + 2 * rate * sums.dg + rate * rate * sums.gg;
  const double distance = sqrt(square < 0 ? 0.0 : square);  // rounding can make it negative; NaN stays
  return {rate, distance <= eps ? 1.0 : eps / distance};
}

// V elements of one image, from the first look at them to the second.
template <int V, class Image, class Grad>
struct StepVector {
  using T = Compute<Image>;

  Vector<Image, V> adv, clean;
  Vector<Grad, V> grad;

  // Entries that are not finite count as 0, so that one overflow does not lose the whole image.
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
      // Rounded once before the projection, as the CPU's kernel does.
      const T moved = static_cast<T>(static_cast<double>(adv.at[i]) + scales.rate * slope(i));
      const double offset = static_cast<double>(moved) - centre;
      const T projected = scales.shrink == 1.0 ? moved : static_cast<T>(centre + scales.shrink * offset);
      adv.at[i] = static_cast<Image>(clamped(projected, lo, hi));
    }
    adv.store(step.out + first);
  }
};

// One of the `kThreads` threads of an image of `count` elements, a multiple of V, that begins at element `image`. Up to
// kHeld vectors stay in registers from the sums to the move; with kHeld = 0 each is read again.
template <int kThreads, int V, int kHeld, class Image, class Grad>
struct StepThread {
  const PgdStep<Image, Grad>& step;
  int64_t image, count;
  int thread;
  StepVector<V, Image, Grad> held[kHeld > 0 ? kHeld : 1];

  SPARSE_ADV_DEVICE StepSums add() {
    StepSums sums{};
    if constexpr (kHeld == 0) {
      for (int64_t first = first_of(0); first < count; first += int64_t{kThreads} * V) {
        held[0].load(step, image + first);
        held[0].add_to(sums);
      }
    } else {
      SPARSE_ADV_UNROLL
      for (int i = 0; i < kHeld; ++i)
        if (first_of(i) < count) {
          held[i].load(step, image + first_of(i));
          held[i].add_to(sums);
        }
    }
    return sums;
  }

  SPARSE_ADV_DEVICE void move(const StepScales& scales) {
    if constexpr (kHeld == 0) {
      for (int64_t first = first_of(0); first < count; first += int64_t{kThreads} * V) {
        held[0].load(step, image + first);
        held[0].move(step, scales, image + first);
      }
    } else {
      SPARSE_ADV_UNROLL
      for (int i = 0; i < kHeld; ++i)
        if (first_of(i) < count) held[i].move(step, scales, image + first_of(i));
    }
  }

  SPARSE_ADV_DEVICE int64_t first_of(int i) const { return (int64_t{kThreads} * i + thread) * V; }
};

}  // namespace sparse_adv
