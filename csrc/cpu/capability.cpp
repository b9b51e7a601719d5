#include "cpu/capability.h"

#include <cstdlib>
#include <string_view>

namespace sparse_adv {

namespace {

Capability detect() {
  Capability best = Capability::portable;
#if defined(SPARSE_ADV_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Capability::avx2;
  if (best == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    best = Capability::avx512;
#endif
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view requested = variable ? variable : "";
  if (requested == "default") return Capability::portable;
  if (requested == "avx2" && best == Capability::avx512) return Capability::avx2;
  return best;
}

}  // namespace

Capability cpu_capability() {
  static const Capability capability = detect();
  return capability;
}

}  // namespace sparse_adv

// The name of the instruction set that this library's kernels use, for sparse_adv/ops/_library.py.
extern "C" [[gnu::visibility("default")]] const char* sparse_adv_cpu_capability() {
  switch (sparse_adv::cpu_capability()) {
    case sparse_adv::Capability::avx512:
      return "avx512";
    case sparse_adv::Capability::avx2:
      return "avx2";
    default:
      return "portable";
  }
}
