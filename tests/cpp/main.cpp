// Compares every kernel of every instruction set that this CPU has with naive loops in double, without torch. To be
// built with SPARSE_ADV_SANITIZE: all buffers are on the heap and exactly as large as the kernel's contract says, so
// AddressSanitizer finds accesses beyond them. Outputs start as NaN, so the comparison finds elements that were written
// by mistake or not at all.
#include <cstdio>
#include <utility>

#include "cpp/kernels_check.h"

using namespace sparse_adv;

namespace {

#define ELEMENT_KERNELS(ISA, T)      \
  {&ISA::pgd_step_linf<T>,           \
   &ISA::pgd_step_l2<T>,             \
   &ISA::random_start_linf<T>,       \
   &ISA::random_start_l2<T>,         \
   &ISA::pointwise<T>,               \
   &ISA::batch_norm_channel_sums<T>, \
   &ISA::batch_norm_pixel_sums<T>,   \
   &ISA::batch_norm_grad_input<T>,   \
   &ISA::max_pool2d_row<T>,          \
   &ISA::max_pool2d_grad_row<T>}
#define KERNELS(ISA)                                                                                                  \
  Kernels {                                                                                                           \
    #ISA, ISA::lane_count(), &ISA::fill_batch_tile, &ISA::store_accumulators, &ISA::fill_width_tile,                  \
        &ISA::store_joined_rows, &ISA::masked_conv2d_tile, &ISA::masked_conv2d_grad_weight_tile,                      \
        &ISA::register_block_of_tile, &ISA::col_indices_inside, &ISA::col_indices_in_triples, &ISA::find_filter_rows, \
        &ISA::col_indices_to_offsets, &ISA::masked_winograd_weight, &ISA::masked_winograd_joined_tiles,               \
        &ISA::masked_winograd_item, &ISA::winograd_weight, &ISA::winograd_tiles, &ISA::winograd_grad_tile,            \
        &ISA::winograd_grad_multiply, &ISA::winograd_grad_taps, ELEMENT_KERNELS(ISA, float),                          \
        ELEMENT_KERNELS(ISA, double)                                                                                  \
  }

bool check_all(const Kernels& kernels) {
  const std::pair<const char*, bool> results[] = {
      {"fill_batch_tile", check_fill_batch_tile(kernels)},
      {"store_accumulators", check_store_accumulators(kernels)},
      {"fill_width_tile", check_fill_width_tile(kernels)},
      {"store_joined_rows", check_store_joined_rows(kernels)},
      {"masked_conv2d", check_conv_tile(kernels)},
      {"masked_conv2d_grad_weight", check_grad_weight_tile(kernels)},
      {"col_indices", check_col_indices(kernels)},
      {"masked_winograd_conv2d", check_masked_winograd(kernels)},
      {"winograd_conv2d", check_winograd(kernels)},
      {"winograd_conv2d_grad_weight", check_winograd_grad_weight(kernels)},
      {"batch_norm_act", check_batch_norm_act(kernels.of_float) && check_batch_norm_act(kernels.of_double)},
      {"max_pool2d", check_max_pool2d(kernels.of_float) && check_max_pool2d(kernels.of_double)},
      {"pgd_step", check_pgd_step(kernels.of_float) && check_pgd_step(kernels.of_double)},
      {"pointwise", check_pointwise(kernels.of_float) && check_pointwise(kernels.of_double)},
      {"random_start", check_random_start(kernels.of_float) && check_random_start(kernels.of_double)},
  };
  for (const auto& [name, good] : results) std::printf("%-8s  %-27s  %s\n", kernels.isa, name, good ? "ok" : "WRONG");
  return std::ranges::all_of(results, [](const auto& result) { return result.second; });
}

}  // namespace

int main() {
  const bool gate_rows = check_gate_rows(), shared_items = check_shared_items();
  if (!gate_rows) std::puts("gate_rows WRONG");
  if (!shared_items) std::puts("shared_items WRONG");
  bool good = gate_rows && shared_items;
  good &= check_all(KERNELS(portable));
#if defined(SPARSE_ADV_X86)
  if (cpu_capability() >= Capability::avx2) good &= check_all(KERNELS(avx2));
  if (cpu_capability() >= Capability::avx512) good &= check_all(KERNELS(avx512));
#endif
  return good ? 0 : 1;
}
