// Loops whose parts take different times: as many threads as there are, each taking the next stretch when it is free.
#pragma once
#include <algorithm>
#include <atomic>

#include "tensor.h"

namespace sparsekern {

// PyTorch's loop over [0, n), left out where there is nothing to share: it takes a fiftieth of a small layer's call.
template <class Body> void parallel_items(int64_t n, int64_t grain, const Body& body) {
  if (n > grain) return torch::stable::parallel_for(0, n, grain, body);
  if (n > 0) body(int64_t(0), n);
}

// Calls body(begin, end) for even stretches of [0, n), of about `grain` or more: at most four for each thread, all at once on
// one thread. What is computed for an item must not depend on the stretch that it is in.
template <class Body> void parallel_stretches(int64_t n, int64_t grain, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads(), grains = (n + grain - 1) / grain;
  if (threads == 1 || grains <= 1) {
    if (n > 0) body(0, n);
    return;
  }
  const int64_t each = std::clamp<int64_t>(n / (threads * grain), 1, 4), count = std::min(threads * each, grains);
  const int64_t step = (n + count - 1) / count;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < n;)
      body(begin, std::min(begin + step, n));
  });
}

} // namespace sparsekern
