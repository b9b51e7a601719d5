// Items of work that threads share.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace sparse_adv {

// The items from 0 to `count` - 1. Each thread takes those of its own share, as if the items were divided beforehand,
// and then what is left of the shares of others. So a thread that is slower, since another program uses its core or the
// core is a small one, delays the others by one item at most.
class SharedItems {
 public:
  SharedItems(int64_t count, int64_t threads) : shares_(threads) {
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].next = count * i / threads;
      shares_[i].end = count * (i + 1) / threads;
    }
  }

  // Calls run(item) for each item that a thread takes.
  template <class Run>
  void take(int64_t thread, const Run& run) {
    const auto threads = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares_[(thread + i) % threads];
      for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) run(item);
    }
  }

 private:
  struct alignas(64) Share {  // a cache line of its own
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares_;
};

}  // namespace sparse_adv
