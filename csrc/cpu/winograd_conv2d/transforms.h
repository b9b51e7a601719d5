// The transformations of Winograd's filtering, on vectors; TILE is m, the rows and columns of a tile of output pixels.
#pragma once

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// The three transformations in one dimension, in place or to a longer or shorter array; Lavin and Gray 2016, equations
// 8 and, for m = 4, section 4.3. TILE is m.
template <int TILE>
static inline __attribute__((always_inline)) void transform_input(Vec* d, int step) {
  if constexpr (TILE == 2) {
    const Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    d[0] = d0 - d2;
    d[step] = d1 + d2;
    d[2 * step] = d2 - d1;
    d[3 * step] = d1 - d3;
  } else {
    const Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const Vec two = broadcast(2.0f), four = broadcast(4.0f), five = broadcast(5.0f);
    const Vec even = d4 - four * d2, odd = d3 - four * d1;
    const Vec even_half = d4 - d2, odd_half = two * (d3 - d1);
    d[0] = four * d0 - five * d2 + d4;
    d[step] = even + odd;
    d[2 * step] = even - odd;
    d[3 * step] = even_half + odd_half;
    d[4 * step] = even_half - odd_half;
    d[5 * step] = four * d1 - five * d3 + d5;
  }
}

template <int TILE>
static inline __attribute__((always_inline)) void transform_output(Vec* m, int step) {
  if constexpr (TILE == 2) {
    const Vec m0 = m[0], m1 = m[step], m2 = m[2 * step], m3 = m[3 * step];
    m[0] = m0 + m1 + m2;
    m[step] = m1 - m2 - m3;
  } else {
    const Vec m0 = m[0], m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step], m5 = m[5 * step];
    const Vec two = broadcast(2.0f), four = broadcast(4.0f), eight = broadcast(8.0f);
    const Vec sum = m1 + m2, difference = m1 - m2, sum_two = m3 + m4, difference_two = m3 - m4;
    m[0] = m0 + sum + sum_two;
    m[step] = difference + two * difference_two;
    m[2 * step] = sum + four * sum_two;
    m[3 * step] = difference + eight * difference_two + m5;
  }
}

// From three taps at g to m + 2 elements at u.
template <int TILE>
static inline __attribute__((always_inline)) void transform_taps(const Vec* g, int step, Vec* u, int u_step) {
  const Vec g0 = g[0], g1 = g[step], g2 = g[2 * step];
  u[(TILE + 1) * u_step] = g2;
  if constexpr (TILE == 2) {
    const Vec half = broadcast(0.5f), outer = half * (g0 + g2), inner = half * g1;
    u[0] = g0;
    u[u_step] = outer + inner;
    u[2 * u_step] = outer - inner;
  } else {
    const Vec sixth = broadcast(-1.0f / 6), outer = sixth * (g0 + g2), inner = sixth * g1;
    const Vec outer_two = broadcast(1.0f / 24) * g0 - sixth * g2, inner_two = broadcast(1.0f / 12) * g1;
    u[0] = broadcast(0.25f) * g0;
    u[u_step] = outer + inner;
    u[2 * u_step] = outer - inner;
    u[3 * u_step] = outer_two + inner_two;
    u[4 * u_step] = outer_two - inner_two;
  }
}

// The adjoint of transform_output: from m elements at y to m + 2 at z.
template <int TILE>
static inline __attribute__((always_inline)) void transform_gradient(const Vec* y, int step, Vec* z, int z_step) {
  z[0] = y[0];
  if constexpr (TILE == 2) {
    const Vec y0 = y[0], y1 = y[step];
    z[z_step] = y0 + y1;
    z[2 * z_step] = y0 - y1;
    z[3 * z_step] = broadcast(0.0f) - y1;
  } else {
    const Vec y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const Vec two = broadcast(2.0f), four = broadcast(4.0f);
    const Vec even = y0 + y2, odd = y1 + y3, even_two = y0 + four * y2, odd_two = two * (y1 + four * y3);
    z[z_step] = even + odd;
    z[2 * z_step] = even - odd;
    z[3 * z_step] = even_two + odd_two;
    z[4 * z_step] = even_two - odd_two;
    z[5 * z_step] = y3;
  }
}

// The adjoint of transform_taps: from m + 2 elements at u to three taps at g.
template <int TILE>
static inline __attribute__((always_inline)) void transform_to_taps(const Vec* u, int u_step, Vec* g, int step) {
  const Vec sum = u[u_step] + u[2 * u_step], difference = u[u_step] - u[2 * u_step], last = u[(TILE + 1) * u_step];
  if constexpr (TILE == 2) {
    const Vec half = broadcast(0.5f);
    g[0] = u[0] + half * sum;
    g[step] = half * difference;
    g[2 * step] = half * sum + last;
  } else {
    const Vec sixth = broadcast(1.0f / 6), sum_two = u[3 * u_step] + u[4 * u_step];
    const Vec difference_two = u[3 * u_step] - u[4 * u_step];
    g[0] = broadcast(0.25f) * u[0] - sixth * sum + broadcast(1.0f / 24) * sum_two;
    g[step] = broadcast(1.0f / 12) * difference_two - sixth * difference;
    g[2 * step] = sixth * (sum_two - sum) + last;
  }
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
