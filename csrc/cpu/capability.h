// The instruction set that this process uses. It is chosen at the first call.
#pragma once

#if defined(__x86_64__)
#define SPARSE_ADV_X86 1
#endif

namespace sparse_adv {

enum class Capability { portable, avx2, avx512 };

// The best one of the machine, or a lower one requested by ATEN_CPU_CAPABILITY (default, avx2, avx512), as in PyTorch.
Capability cpu_capability();

// The variant of a kernel for this process: each *_kernel.cpp is compiled once per instruction set (CMakeLists.txt).
template <class Function>
Function choose([[maybe_unused]] Function portable, [[maybe_unused]] Function avx2, [[maybe_unused]] Function avx512) {
  switch (cpu_capability()) {
    case Capability::avx512:
      return avx512;
    case Capability::avx2:
      return avx2;
    default:
      return portable;
  }
}

}  // namespace sparse_adv

#if defined(SPARSE_ADV_X86)
#define SPARSE_ADV_FOR_EACH_ISA(DECLARATION) \
  namespace portable {                       \
  DECLARATION;                               \
  }                                          \
  namespace avx2 {                           \
  DECLARATION;                               \
  }                                          \
  namespace avx512 {                         \
  DECLARATION;                               \
  }
#define SPARSE_ADV_CHOOSE(kernel) \
  ::sparse_adv::choose(&::sparse_adv::portable::kernel, &::sparse_adv::avx2::kernel, &::sparse_adv::avx512::kernel)
#else
#define SPARSE_ADV_FOR_EACH_ISA(DECLARATION) \
  namespace portable {                       \
  DECLARATION;                               \
  }
#define SPARSE_ADV_CHOOSE(kernel) (&::sparse_adv::portable::kernel)
#endif
