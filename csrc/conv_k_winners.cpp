// conv_max_pool_k_winners2d for the CPU: contract in sparsekern/ops/conv_k_winners.py.
#include "conv_k_winners.h"

#include <tuple>
#include <vector>

#include "k_winners_calls.h"

namespace sparsekern {
namespace {

const ConvKWinnersKernels& kernels() { return SPARSEKERN_SELECT(conv_k_winners); }

ConvKWinnersArgs arguments(const Tensor& x, int64_t C, int64_t KH, int64_t KW, int64_t k) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.size(1) == 1 && C % 16 == 0 && KW <= kMostTaps,
                  "conv_max_pool_k_winners2d: wants float32 images of one channel, 16 n filters and at most ", kMostTaps,
                  " columns in a kernel, got ", x.size(1), " channels, ", C, " filters and ", KW, " columns");
  STD_TORCH_CHECK(C * x.size(2) * x.size(3) <= INT32_MAX, "conv_max_pool_k_winners2d: wants maps of at most 2^31 - 1 units");
  ConvKWinnersArgs args{};
  args.x = static_cast<const float*>(x.data_ptr());
  args.height = x.size(2), args.width = x.size(3), args.KH = KH, args.KW = KW;
  PooledArgs& pooled = args.pooled;
  pooled.C = C, pooled.H = args.height - KH + 1, pooled.W = args.width - KW + 1, pooled.pool = 2, pooled.channels_last = true;
  pooled.rows.dtype = DType::f32;
  pooled.rows.n = C * (pooled.H / 2) * (pooled.W / 2), pooled.rows.k = k, pooled.rows.channels = C, pooled.rows.inner = 1;
  return args;
}

const float* floats(const std::optional<Tensor>& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(unstrided(*t)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_max_pool_k_winners2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& scale, int64_t k, const std::optional<Tensor>& duty_cycle,
    const std::optional<Tensor>& boost_strength, bool want_offsets, std::optional<double> eps) {
  const int64_t B = x.size(0), C = weight.size(0), taps = weight.size(2) * weight.size(3);
  ConvKWinnersArgs args = arguments(x, C, weight.size(2), weight.size(3), k);
  PooledArgs& pooled = args.pooled;
  const int64_t n = pooled.rows.n;
  Tensor y = empty_maps(x, {B, C, pooled.H / 2, pooled.W / 2}, true);
  Tensor winners = empty(ScalarType::Byte, {B, (n + 15) / 16 * 2});
  Tensor offsets = empty(ScalarType::Int, {B, want_offsets ? k : 0});
  Tensor counts = zeros(ScalarType::Long, {C + 1});
  const std::optional<Tensor> means = dense(mean), biases = dense(bias);
  const std::optional<Tensor> scales = scale && eps ? inverse_deviation(*scale, *eps) : dense(scale);
  pooled.rows.y = y.data_ptr(), pooled.rows.winners = static_cast<uint8_t*>(winners.data_ptr());
  pooled.rows.factors = boost_factors(duty_cycle, boost_strength, k, n, C, 1);
  pooled.offsets = want_offsets ? static_cast<int32_t*>(offsets.data_ptr()) : nullptr;
  pooled.mean = floats(means), pooled.scale = floats(scales);
  std::vector<float> packed(size_t(kernels().packed_size(C, taps)));
  kernels().pack(static_cast<const float*>(weight.data_ptr()), floats(biases), C, taps, packed.data());
  args.weight = packed.data();
  count_rows(B, 4 * n, counts, [&](int64_t begin, int64_t end, int64_t* part) { kernels().forward(args, begin, end, part); });
  return {y, winners, offsets, counts};
}

// Parts of the rows are summed each for itself and then in order: their bounds come from the shape alone.
Tensor conv_max_pool_k_winners2d_grad_weight(const Tensor& grad_y, const Tensor& winners, const Tensor& offsets,
                                             const Tensor& x, std::vector<int64_t> kernel_size) {
  constexpr int64_t kParts = 16;
  const int64_t B = x.size(0), C = grad_y.size(1), KH = kernel_size[0], KW = kernel_size[1], size = C * (KH * KW + 1);
  ConvKWinnersArgs args = arguments(x, C, KH, KW, offsets.size(1));
  args.pooled.rows.winners = static_cast<uint8_t*>(winners.data_ptr());
  args.pooled.offsets = static_cast<int32_t*>(offsets.data_ptr());
  const float* grads = static_cast<const float*>(grad_y.data_ptr());
  const int64_t parts = std::max<int64_t>(1, std::min(B, kParts));
  std::vector<double> sums(size_t(parts * size));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernels().gradient(args, grads, B * i / parts, B * (i + 1) / parts, sums.data() + i * size);
  });
  Tensor total = empty(ScalarType::Double, {C, KH * KW + 1});
  double* out = static_cast<double*>(total.data_ptr());
  for (int64_t j = 0; j < size; j++) {
    double sum = 0;
    for (int64_t i = 0; i < parts; i++) sum += sums[size_t(i * size + j)];
    out[j] = sum;
  }
  return total;
}

Tensor patch_moments(const Tensor& x, std::vector<int64_t> kernel_size) {
  const int64_t KH = kernel_size[0], KW = kernel_size[1], side = KH * KW + 1;
  Tensor moments = zeros(ScalarType::Double, {side, side});
  torch::stable::parallel_for(0, kernels().patch_parts(KH, KW), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernels().patch_moments(static_cast<const float*>(x.data_ptr()), x.size(0), x.size(2), x.size(3), KH, KW, i,
                              static_cast<double*>(moments.data_ptr()));
  });
  return moments;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("conv_max_pool_k_winners2d", TORCH_BOX(&conv_max_pool_k_winners2d));
  m.impl("conv_max_pool_k_winners2d_grad_weight", TORCH_BOX(&conv_max_pool_k_winners2d_grad_weight));
  m.impl("patch_moments", TORCH_BOX(&patch_moments));
}

} // namespace sparsekern
