// Loads and stores of up to 16 bytes. Kernel bodies (*_kernel.h) are plain C++: nvcc compiles them for GPUs, and the
// tests compile them for the host, where they run one thread after the other (tests/kernels/cuda_on_host.cpp).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define SPARSE_ADV_DEVICE __host__ __device__ __forceinline__
#else
#define SPARSE_ADV_DEVICE inline
#endif

#ifdef __CUDA_ARCH__
#define SPARSE_ADV_UNROLL _Pragma("unroll")  // arrays stay in registers only if the loops over them are unrolled
#else
#define SPARSE_ADV_UNROLL
#endif

namespace sparse_adv {

// 16-bit images are computed in float32 and rounded once.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kAccessBytes = 16;

// How many elements a thread computes at a time: as many of the narrower type as one access has.
template <class Image, class Grad>
constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(Image) < sizeof(Grad) ? sizeof(Image) : sizeof(Grad));

// N elements, read and written in accesses of up to 16 bytes. Addresses must be aligned to the size of an access.
template <class T, int N>
struct Vector {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  struct alignas(kBytes < kAccessBytes ? kBytes : kAccessBytes) Access {
    uint32_t word[(kBytes < kAccessBytes ? kBytes : kAccessBytes) / 4];
  };
  static constexpr int kAccesses = kBytes / static_cast<int>(sizeof(Access));
  static_assert(kBytes % 4 == 0);

  T at[N];

  SPARSE_ADV_DEVICE void load(const T* from) {
    for (int i = 0; i < kAccesses; ++i) {
      const Access access = reinterpret_cast<const Access*>(from)[i];
      memcpy(reinterpret_cast<char*>(at) + i * sizeof(Access), &access, sizeof(Access));
    }
  }

  SPARSE_ADV_DEVICE void store(T* to) const {
    for (int i = 0; i < kAccesses; ++i) {
      Access access;
      memcpy(&access, reinterpret_cast<const char*>(at) + i * sizeof(Access), sizeof(Access));
      reinterpret_cast<Access*>(to)[i] = access;
    }
  }
};

// One element; the address need not be aligned to more than that.
template <class T>
struct Vector<T, 1> {
  T at[1];
  SPARSE_ADV_DEVICE void load(const T* from) { at[0] = *from; }
  SPARSE_ADV_DEVICE void store(T* to) const { *to = at[0]; }
};

// NaN stays NaN, as in torch.clamp.
template <class T>
SPARSE_ADV_DEVICE T clamped(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

}  // namespace sparse_adv
