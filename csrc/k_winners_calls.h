// What the registrations of k-winners share: the boost factors, and how rows are cut into parts.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>

#include "k_winners.h"
#include "tensor.h"

namespace sparsekern {
namespace {

// Units a thread: below, starting threads costs more than it saves. n = 1000, us on one and two threads (Zen 4): 23 and 29
// for 32 rows, 39 and 31 for 64.
constexpr int64_t kParallelWork = 20480;

// The factors of Algorithm 1 in the calling thread's scratch; null where nothing is boosted.
const float* boost_factors(const std::optional<Tensor>& duty_cycle, const std::optional<Tensor>& boost_strength,
                           int64_t k, int64_t n, int64_t channels, int64_t inner) {
  STD_TORCH_CHECK((!duty_cycle || (duty_cycle->scalar_type() == ScalarType::Float && duty_cycle->numel() == channels)) &&
                      (!boost_strength || (boost_strength->scalar_type() == ScalarType::Float && boost_strength->numel() == 1)),
                  "k_winners: wants duty_cycle (", channels, ",) and boost_strength () in float32");
  const float strength = boost_strength ? *static_cast<const float*>(boost_strength->data_ptr()) : 0.0f;
  if (!duty_cycle || strength == 0 || n == 0) return nullptr; // a strength of 0 multiplies by 1
  const Tensor duty = unstrided(*duty_cycle);
  float* factors = static_cast<float*>(scratch(kFactorsSlot, size_t(n) * sizeof(float)));
  SPARSEKERN_SELECT(k_winners)
      .boost_factors(static_cast<const float*>(duty.data_ptr()), double(k) / double(n), strength, channels, inner, n,
                     factors);
  return factors;
}

// 1 / sqrt(variance + eps) of float32 or float64.
Tensor inverse_deviation(const Tensor& variance, double eps) {
  const Tensor from = unstrided(variance);
  Tensor to = empty(variance.scalar_type(), {variance.numel()});
  const auto fill = [&]<class A>(const A* v, A* scale) {
    for (int64_t c = 0; c < variance.numel(); c++) scale[c] = A(1) / std::sqrt(v[c] + A(eps));
  };
  if (variance.scalar_type() == ScalarType::Double)
    fill(static_cast<const double*>(from.data_ptr()), static_cast<double*>(to.data_ptr()));
  else fill(static_cast<const float*>(from.data_ptr()), static_cast<float*>(to.data_ptr()));
  return to;
}

// Calls run(begin, end, counts) for all rows. Each chunk of rows counts for itself, so that counting needs no atomics.
template <class Run> void count_rows(int64_t rows, int64_t row_units, const Tensor& counts, Run run) {
  const int64_t channels = counts.size(0) - 1;
  int64_t* total = static_cast<int64_t*>(counts.data_ptr());
  total[channels] = rows;
  const int64_t chunks = std::max<int64_t>(
      1, std::min({rows, int64_t(torch::stable::get_num_threads()), rows * row_units / kParallelWork}));
  if (chunks == 1) return run(0, rows, total);
  Tensor partial = zeros(ScalarType::Long, {chunks, channels});
  int64_t* parts = static_cast<int64_t*>(partial.data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) run(rows * i / chunks, rows * (i + 1) / chunks, parts + i * channels);
  });
  for (int64_t i = 0; i < chunks; i++)
    for (int64_t c = 0; c < channels; c++) total[c] += parts[i * channels + c];
}

} // namespace
} // namespace sparsekern
