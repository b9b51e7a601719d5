// Every kernel of every instruction set that this CPU has, against naive loops in double, without torch: a program to
// build with SPARSE_ADV_SANITIZE. All buffers lie on the heap and are exactly as large as the kernel's contract says,
// and outputs start as NaN: AddressSanitizer sees an access beyond them, and the comparison sees what should not have
// been written or was not.
#include <cstdio>
#include <utility>

#include "cpp/kernels_check.h"

using namespace sparse_adv;

namespace {

#define ELEMENT_KERNELS(ISA, T) \
  {&ISA::pgd_step_linf<T>, &ISA::pgd_step_l2<T>, &ISA::random_start_linf<T>, &ISA::random_start_l2<T>}
#define KERNELS(ISA)                                                                                              \
  Kernels {                                                                                                       \
    #ISA, ISA::lane_count(), &ISA::fill_window, &ISA::store_sums, &ISA::fill_rows, &ISA::masked_conv2d_tile,      \
        &ISA::masked_conv2d_grad_weight_tile, &ISA::entries_inside, &ISA::entries_in_threes, &ISA::entry_offsets, \
        ELEMENT_KERNELS(ISA, float), ELEMENT_KERNELS(ISA, double)                                                 \
  }

bool check_all(const Kernels& kernels) {
  const std::pair<const char*, bool> results[] = {
      {"fill_window", check_fill_window(kernels)},
      {"store_sums", check_store_sums(kernels)},
      {"fill_rows", check_fill_rows(kernels)},
      {"masked_conv2d", check_conv_tile(kernels)},
      {"masked_conv2d_grad_weight", check_grad_weight_tile(kernels)},
      {"entries", check_entries(kernels)},
      {"pgd_step", check_pgd_step(kernels.of_float) && check_pgd_step(kernels.of_double)},
      {"random_start", check_random_start(kernels.of_float) && check_random_start(kernels.of_double)},
  };
  for (const auto& [name, good] : results) std::printf("%-8s  %-25s  %s\n", kernels.isa, name, good ? "ok" : "WRONG");
  return std::ranges::all_of(results, [](const auto& result) { return result.second; });
}

}  // namespace

int main() {
  bool good = check_all(KERNELS(portable));
#if defined(SPARSE_ADV_X86)
  if (cpu_capability() >= Capability::avx2) good &= check_all(KERNELS(avx2));
  if (cpu_capability() >= Capability::avx512) good &= check_all(KERNELS(avx512));
#endif
  return good ? 0 : 1;
}
