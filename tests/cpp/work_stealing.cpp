#include "cpu/work_stealing.h"

#include <thread>

#include "cpp/kernels_check.h"

namespace sparse_adv {

// Whether each item is taken once if `takers` of `threads` threads take part.
static bool check_shared_items(int64_t count, int64_t threads, int64_t takers) {
  SharedItems items(count, threads);
  std::vector<std::atomic<int>> taken(count);
  {
    std::vector<std::jthread> workers;
    for (int64_t thread = 0; thread < takers; ++thread)
      workers.emplace_back([&, thread] { items.take(thread, [&](int64_t item) { ++taken[item]; }); });
  }
  return std::ranges::all_of(taken, [](const auto& times) { return times == 1; });
}

bool check_shared_items() {
  bool good = true;
  for (int64_t count : {0, 1, 5, 1000})
    for (int64_t threads : {1, 2, 3, 8})
      for (int64_t takers : {int64_t{1}, threads}) good &= check_shared_items(count, threads, takers);
  return good;
}

}  // namespace sparse_adv
