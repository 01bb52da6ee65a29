// Loops whose parts take different times: as many threads as there are, each taking the next stretch when it is free.
#pragma once
#include <atomic>

#include "tensor.h"

namespace sparsekern {

// Calls body(begin, end) for stretches of [0, n) of at least `grain`, a few for each thread; all at once on one thread. What
// is computed for an item must not depend on the stretch that it is in.
template <class Body> void parallel_stretches(int64_t n, int64_t grain, const Body& body) {
  constexpr int64_t kEach = 4;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || n <= grain) {
    if (n > 0) body(0, n);
    return;
  }
  const int64_t even = (n + kEach * threads - 1) / (kEach * threads), step = even > grain ? even : grain;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < n;)
      body(begin, begin + step < n ? begin + step : n);
  });
}

} // namespace sparsekern
