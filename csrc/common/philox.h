// The random bits of random_start on every device: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011). The functions are static, as the kernel files of all instruction sets include them (cpu/simd.h).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SPARSE_ADV_PHILOX static __host__ __device__ __forceinline__
#else
#define SPARSE_ADV_PHILOX static inline
#endif

namespace sparse_adv {

enum class PhiloxStream : uint32_t { elements, radii };  // the third counter word: streams never share a block

template <int kBlocks>
struct PhiloxBlocks {
  uint32_t word[4][kBlocks];
};

// The blocks of kBlocks consecutive counters. The compiler vectorises the loops over them.
template <int kBlocks>
SPARSE_ADV_PHILOX PhiloxBlocks<kBlocks> philox(uint64_t counter, PhiloxStream stream, uint64_t key) {
  PhiloxBlocks<kBlocks> x;
  for (int i = 0; i < kBlocks; ++i) {
    const uint64_t position = counter + static_cast<uint64_t>(i);
    x.word[0][i] = static_cast<uint32_t>(position);
    x.word[1][i] = static_cast<uint32_t>(position >> 32);
    x.word[2][i] = static_cast<uint32_t>(stream);
    x.word[3][i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53} * x.word[0][i];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * x.word[2][i];
      x.word[0][i] = static_cast<uint32_t>(product1 >> 32) ^ x.word[1][i] ^ key0;
      x.word[1][i] = static_cast<uint32_t>(product1);
      x.word[2][i] = static_cast<uint32_t>(product0 >> 32) ^ x.word[3][i] ^ key1;
      x.word[3][i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

// Uniform in (0, 1]: 0 is excluded because its logarithm is taken.
SPARSE_ADV_PHILOX double unit(uint32_t bits) { return (static_cast<double>(bits) + 1.0) * 0x1p-32; }

// Uniform in [-1, 1), a multiple of 2^-23: its product with a float is exact in double.
SPARSE_ADV_PHILOX double fraction(uint32_t bits) {
  return static_cast<double>(static_cast<int32_t>(bits >> 8)) * 0x1p-23 - 1.0;
}

}  // namespace sparse_adv
