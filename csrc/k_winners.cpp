// k_winners for the CPU: contract and shapes in sparsekern/ops/k_winners.py, inner loops in k_winners_kernel.cpp.
#include <tuple>
#include <vector>

#include "k_winners_calls.h"

namespace sparsekern {
namespace {

std::tuple<Tensor, Tensor, Tensor> k_winners(const Tensor& x, int64_t k, const std::optional<Tensor>& duty_cycle,
                                             const std::optional<Tensor>& boost_strength, int64_t channels,
                                             int64_t inner) {
  STD_TORCH_CHECK(x.dim() == 2 && k >= 0 && k <= x.size(1), "k_winners: wants x (rows, n) and k in 0..n, got ", x.dim(),
                  " dimensions and k ", k);
  const int64_t rows = x.size(0), n = x.size(1);
  Tensor y = empty(x.scalar_type(), {rows, n});
  Tensor winners = empty(ScalarType::Byte, {rows, (n + 15) / 16 * 2});
  Tensor counts = zeros(ScalarType::Long, {channels + 1});
  const KWinnersArgs args{dtype_of("k_winners", x), x.data_ptr(), y.data_ptr(),
                          static_cast<uint8_t*>(winners.data_ptr()),
                          boost_factors(duty_cycle, boost_strength, k, n, channels, inner), n, k, channels, inner};
  count_rows(rows, n, counts, [&](int64_t begin, int64_t end, int64_t* part) {
    SPARSEKERN_SELECT(k_winners).forward(args, begin, end, part);
  });
  return {y, winners, counts};
}

using Pooled = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Where in a contiguous map the units of a channels-last one stand.
std::vector<int32_t> contiguous_places(int64_t C, int64_t locations) {
  std::vector<int32_t> places(static_cast<size_t>(C * locations));
  for (int64_t p = 0; p < locations; p++)
    for (int64_t c = 0; c < C; c++) places[size_t(p * C + c)] = int32_t(c * locations + p);
  return places;
}

// mean and scale: null, or (C,) in the accumulator type.
Pooled pooled(const Tensor& x, const void* mean, const void* scale, int64_t k, const std::optional<Tensor>& duty_cycle,
              const std::optional<Tensor>& boost_strength, int64_t pool, bool contiguous) {
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = H / pool, Q = W / pool, n = C * P * Q;
  const bool channels_last = !x.is_contiguous(), moves = channels_last && contiguous;
  STD_TORCH_CHECK(C * H * W <= INT32_MAX, "max_pool_k_winners2d: wants maps of at most 2^31 - 1 units, got ", C * H * W);
  Tensor y = empty_maps(x, {B, C, P, Q}, channels_last && !contiguous);
  const std::vector<int32_t> places = moves ? contiguous_places(C, P * Q) : std::vector<int32_t>();
  Tensor winners = empty(ScalarType::Byte, {B, (n + 15) / 16 * 2});
  Tensor offsets = empty(ScalarType::Int, {B, k});
  Tensor counts = zeros(ScalarType::Long, {C + 1});
  const int64_t inner = channels_last ? 1 : P * Q;
  const PooledArgs args{{dtype_of("max_pool_k_winners2d", x), x.data_ptr(), y.data_ptr(),
                         static_cast<uint8_t*>(winners.data_ptr()),
                         boost_factors(duty_cycle, boost_strength, k, n, C, inner), n, k, C, inner},
                        C, H, W, pool, channels_last, static_cast<int32_t*>(offsets.data_ptr()), mean, scale,
                        moves ? places.data() : nullptr};
  count_rows(B, C * H * W, counts, [&](int64_t begin, int64_t end, int64_t* part) {
    SPARSEKERN_SELECT(k_winners).forward_pooled(args, begin, end, part);
  });
  return {y, winners, offsets, counts};
}

Pooled max_pool_k_winners2d(const Tensor& x, int64_t k, const std::optional<Tensor>& duty_cycle,
                            const std::optional<Tensor>& boost_strength, int64_t pool, bool contiguous) {
  return pooled(x, nullptr, nullptr, k, duty_cycle, boost_strength, pool, contiguous);
}

Pooled norm_max_pool_k_winners2d(const Tensor& x, const Tensor& mean, const Tensor& scale, int64_t k,
                                 const std::optional<Tensor>& duty_cycle, const std::optional<Tensor>& boost_strength,
                                 int64_t pool, bool contiguous, std::optional<double> eps) {
  const Tensor mean_values = unstrided(mean), scale_values = eps ? inverse_deviation(scale, *eps) : unstrided(scale);
  return pooled(x, mean_values.data_ptr(), scale_values.data_ptr(), k, duty_cycle, boost_strength, pool,
                contiguous);
}

// Rows (B, 2, C) summed over B, in order.
std::vector<double> add_rows(const std::vector<double>& rows, int64_t B, int64_t C) {
  std::vector<double> sums(size_t(2 * C), 0.0);
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < 2 * C; i++) sums[size_t(i)] += rows[size_t(b * 2 * C + i)];
  return sums;
}

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x) {
  const int64_t B = x.size(0), C = x.size(1), pixels = x.size(2) * x.size(3);
  const DType dtype = dtype_of("channel_moments", x);
  std::vector<double> rows(size_t(B * 2 * C));
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    SPARSEKERN_SELECT(k_winners).moments(dtype, x.data_ptr(), !x.is_contiguous(), C, pixels, rows.data(), begin, end);
  });
  const std::vector<double> sums = add_rows(rows, B, C);
  const ScalarType type = dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor mean = empty(type, {C}), variance = empty(type, {C});
  const auto set = [&](const Tensor& t, int64_t c, double value) {
    if (dtype == DType::f64) static_cast<double*>(t.data_ptr())[c] = value;
    else static_cast<float*>(t.data_ptr())[c] = float(value);
  };
  for (int64_t c = 0; c < C; c++) {
    const double centre = sums[size_t(c)] / double(B);
    double squares = sums[size_t(C + c)]; // within the samples, and between their means
    for (int64_t b = 0; b < B; b++) {
      const double d = rows[size_t(b * 2 * C + c)] - centre;
      squares += d * d * double(pixels);
    }
    set(mean, c, centre);
    set(variance, c, squares / double(B * pixels));
  }
  return {mean, variance};
}

Tensor norm_max_pool_k_winners2d_backward(const Tensor& grad_y, const Tensor& y, const Tensor& winners,
                                          const Tensor& offsets, const Tensor& x, const Tensor& mean,
                                          const Tensor& scale) {
  const int64_t B = x.size(0), C = x.size(1), pixels = x.size(2) * x.size(3), locations = y.size(2) * y.size(3);
  const bool channels_last = !x.is_contiguous(), moved = channels_last && y.is_contiguous();
  const std::vector<int32_t> places = moved ? contiguous_places(C, locations) : std::vector<int32_t>();
  Tensor grad_x = empty_maps(x, {B, C, x.size(2), x.size(3)}, channels_last);
  const Tensor mean_values = unstrided(mean), scale_values = unstrided(scale);
  const NormGradArgs args{dtype_of("norm_max_pool_k_winners2d_backward", x), grad_y.data_ptr(), y.data_ptr(),
                          static_cast<const uint8_t*>(winners.data_ptr()),
                          static_cast<const int32_t*>(offsets.data_ptr()), x.data_ptr(), grad_x.data_ptr(),
                          mean_values.data_ptr(), scale_values.data_ptr(), C * locations, offsets.size(1), C,
                          channels_last ? 1 : locations, pixels, channels_last, moved ? places.data() : nullptr};
  std::vector<double> rows(size_t(B * 2 * C));
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    SPARSEKERN_SELECT(k_winners).norm_grad_sums(args, rows.data(), begin, end);
  });
  std::vector<double> means = add_rows(rows, B, C);
  for (double& m : means) m /= double(B * pixels);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    SPARSEKERN_SELECT(k_winners).norm_grad(args, means.data(), begin, end);
  });
  return grad_x;
}

Tensor max_pool_k_winners2d_backward(const Tensor& grad_y, const Tensor& winners, const Tensor& offsets, int64_t H,
                                     int64_t W, bool channels_last) {
  const int64_t B = grad_y.size(0), C = grad_y.size(1), locations = grad_y.size(2) * grad_y.size(3);
  const int64_t n = C * locations, map = C * H * W;
  const bool moved = channels_last && grad_y.is_contiguous();
  const std::vector<int32_t> places = moved ? contiguous_places(C, locations) : std::vector<int32_t>();
  Tensor grad_x = empty_maps(grad_y, {B, C, H, W}, channels_last);
  const DType dtype = dtype_of("max_pool_k_winners2d_backward", grad_y);
  torch::stable::parallel_for(0, B, map > 0 ? kParallelWork / map + 1 : B + 1, [&](int64_t begin, int64_t end) {
    SPARSEKERN_SELECT(k_winners)
        .backward_pooled(dtype, grad_y.data_ptr(), moved ? places.data() : nullptr,
                         static_cast<const uint8_t*>(winners.data_ptr()),
                         static_cast<const int32_t*>(offsets.data_ptr()), grad_x.data_ptr(), n, offsets.size(1), map,
                         begin, end);
  });
  return grad_x;
}

Tensor k_winners_backward(const Tensor& grad_y, const Tensor& winners) {
  const KWinnersKernels& kernels = SPARSEKERN_SELECT(k_winners);
  const int64_t rows = grad_y.size(0), n = grad_y.size(1);
  Tensor grad_x = empty(grad_y.scalar_type(), {rows, n});
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
  const int64_t channels = duty_cycle.numel();
  STD_TORCH_CHECK(duty_cycle.scalar_type() == ScalarType::Float && duty_cycle.is_contiguous() &&
                      samples_seen.scalar_type() == ScalarType::Long && samples_seen.numel() == 1 &&
                      counts.scalar_type() == ScalarType::Long && counts.numel() == channels + 1 && counts.is_contiguous(),
                  "update_duty_cycle_: wants duty_cycle (C,) in float32, samples_seen () and counts (C + 1,) in int64");
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
  m.impl("max_pool_k_winners2d", TORCH_BOX(&max_pool_k_winners2d));
  m.impl("max_pool_k_winners2d_backward", TORCH_BOX(&max_pool_k_winners2d_backward));
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("norm_max_pool_k_winners2d", TORCH_BOX(&norm_max_pool_k_winners2d));
  m.impl("norm_max_pool_k_winners2d_backward", TORCH_BOX(&norm_max_pool_k_winners2d_backward));
  m.impl("update_duty_cycle_", TORCH_BOX(&update_duty_cycle_));
}

} // namespace sparsekern
