// k_winners for the CPU: contract and shapes in sparsekern/ops/k_winners.py, inner loops in k_winners_kernel.cpp.
#include "k_winners.h"

#include <tuple>

#include "tensor.h"

namespace sparsekern {
namespace {

constexpr int64_t kParallelWork = 32768; // units a thread: below, starting threads costs more than it saves

std::tuple<Tensor, Tensor, Tensor> k_winners(const Tensor& x, int64_t k, const std::optional<Tensor>& duty_cycle,
                                             const std::optional<Tensor>& boost_strength, int64_t channels,
                                             int64_t inner) {
  const KWinnersKernels& kernels = SPARSEKERN_SELECT(k_winners);
  const int64_t rows = x.size(0), n = x.size(1);
  Tensor y = torch::stable::empty_like(x);
  Tensor winners = torch::stable::new_empty(x, {rows, (n + 15) / 16 * 2}, ScalarType::Byte);
  Tensor counts = torch::stable::new_zeros(x, {channels + 1}, ScalarType::Long);
  int64_t* total = static_cast<int64_t*>(counts.data_ptr());
  total[channels] = rows;

  KWinnersArgs args{dtype_of("k_winners", x), x.data_ptr(), y.data_ptr(), static_cast<uint8_t*>(winners.data_ptr()),
                    nullptr, n, k, channels, inner};
  const float strength = boost_strength ? *static_cast<const float*>(boost_strength->data_ptr()) : 0.0f;
  if (duty_cycle && strength != 0 && n > 0) { // a strength of 0 multiplies by 1
    const Tensor duty = torch::stable::contiguous(*duty_cycle);
    float* factors = static_cast<float*>(scratch(kFactorsSlot, size_t(n) * sizeof(float)));
    kernels.boost_factors(static_cast<const float*>(duty.data_ptr()), double(k) / double(n), strength, channels, inner,
                          n, factors);
    args.factors = factors;
  }

  // Each chunk counts for itself, so that counting needs no atomics.
  const int64_t chunks = std::max<int64_t>(
      1, std::min({rows, int64_t(torch::stable::get_num_threads()), rows * n / kParallelWork}));
  if (chunks == 1) {
    kernels.forward(args, 0, rows, total);
    return {y, winners, counts};
  }
  Tensor partial = torch::stable::new_zeros(x, {chunks, channels}, ScalarType::Long);
  int64_t* parts = static_cast<int64_t*>(partial.data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernels.forward(args, rows * i / chunks, rows * (i + 1) / chunks, parts + i * channels);
  });
  for (int64_t i = 0; i < chunks; i++)
    for (int64_t c = 0; c < channels; c++) total[c] += parts[i * channels + c];
  return {y, winners, counts};
}

Tensor k_winners_backward(const Tensor& grad_y, const Tensor& winners) {
  const KWinnersKernels& kernels = SPARSEKERN_SELECT(k_winners);
  const int64_t rows = grad_y.size(0), n = grad_y.size(1);
  Tensor grad_x = torch::stable::empty_like(grad_y);
  const DType dtype = dtype_of("k_winners_backward", grad_y);
  torch::stable::parallel_for(0, rows, n > 0 ? kParallelWork / n + 1 : rows + 1, [&](int64_t begin, int64_t end) {
    kernels.backward(dtype, grad_y.data_ptr(), static_cast<const uint8_t*>(winners.data_ptr()), grad_x.data_ptr(), n,
                     begin, end);
  });
  return grad_x;
}

void update_duty_cycle_(Tensor duty_cycle, Tensor samples_seen, const Tensor& counts, int64_t period,
                        int64_t rows_per_sample, int64_t locations) {
  const KWinnersKernels& kernels = SPARSEKERN_SELECT(k_winners);
  const int64_t channels = duty_cycle.size(0);
  const int64_t* wins = static_cast<const int64_t*>(counts.data_ptr());
  int64_t& seen = *static_cast<int64_t*>(samples_seen.data_ptr());
  const int64_t samples = wins[channels] / rows_per_sample;
  seen += samples;
  const double window = double(std::max<int64_t>({1, samples, std::min(seen, period)}));
  kernels.update(static_cast<float*>(duty_cycle.data_ptr()), wins, channels, 1 - double(samples) / window,
                 double(locations) * window);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("k_winners", TORCH_BOX(&k_winners));
  m.impl("k_winners_backward", TORCH_BOX(&k_winners_backward));
  m.impl("update_duty_cycle_", TORCH_BOX(&update_duty_cycle_));
}

} // namespace sparsekern
