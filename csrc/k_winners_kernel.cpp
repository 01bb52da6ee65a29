// k-winners, one row at a time: integer keys of the boosted units, the exact threshold (k_winners_select.h), then output,
// winners' bits and counts in one pass.
#include "k_winners_pooled.h"

namespace sparsekern {
namespace {

constexpr int kFactors = kRegLanes<double>;
using factors_t = reg<double>;
using factor_bits_t = reg<int64_t>;
typedef float narrow_t __attribute__((vector_size(4 * kFactors)));

// exp in double to about 1 ulp: 2^n times the Taylor series on |r| <= ln(2)/2, whose first dropped term is below 2^-57.
// The result is rounded to float, where every body agrees; of exponents beyond float's range, those at its ends (as the
// reference; NaN stays).
SPARSEKERN_INLINE factors_t exp_double(factors_t x) {
  x = x < -87 ? factors_t{} - 87 : x;
  x = x > 88 ? factors_t{} + 88 : x;
  const factors_t shifted = x * 1.4426950408889634 + 0x1.8p52; // the integer is in the low bits
  const factors_t n = shifted - 0x1.8p52;
  const factors_t r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33; // ln(2) in two parts, the first short
  constexpr double kSeries[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
  factors_t p = factors_t{} + 1.0 / 6227020800;
  for (const double c : kSeries) p = fma_reg(p, r, factors_t{} + c);
  return p * (factors_t)(((factor_bits_t)shifted + 1023) << 52);
}

// Expanded in place, from the last unit to the first, as a channel's factor is never right of its units.
void boost_factors(const float* duty_cycle, double target, double strength, int64_t channels, int64_t inner, int64_t n,
                   float* factors) {
  const auto eight = [&](const float* duty_cycle, float* factors) {
    narrow_t duty;
    std::memcpy(&duty, duty_cycle, sizeof duty);
    duty = __builtin_convertvector(exp_double((target - __builtin_convertvector(duty, factors_t)) * strength), narrow_t);
    std::memcpy(factors, &duty, sizeof duty);
  };
  int64_t c = 0;
  for (; c + kFactors <= channels; c += kFactors) eight(duty_cycle + c, factors + c);
  if (c < channels) {
    float rest[kFactors] = {};
    std::memcpy(rest, duty_cycle + c, size_t(channels - c) * sizeof(float));
    eight(rest, rest);
    std::memcpy(factors + c, rest, size_t(channels - c) * sizeof(float));
  }
  if (inner > 1)
    for (c = channels - 1; c >= 0; c--) {
      const float factor = factors[c];
      for (int64_t i = 0; i < inner; i++) factors[c * inner + i] = factor;
    }
  for (int64_t u = channels * inner; u < n; u++) factors[u] = factors[u - channels * inner];
}

// Output, bits and, if `lanes` is given, counts: unit j's at lanes[j % period].
template <class T>
SPARSEKERN_INLINE void emit(const T* x, const key_t<T>* keys, key_t<T> t, int64_t n, T* y, uint8_t* winners,
                            int32_t* lanes, int64_t period) {
  int64_t j = 0, c = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const uint32_t bits = mask_ge(keys + j, t);
    keep(x + j, bits, y + j);
    store_bits(winners + j / 8, bits);
    if (lanes != nullptr) {
      add_bits(lanes + c, bits);
      c = c + kLanes >= period ? 0 : c + kLanes;
    }
  }
  if (j < n) {
    const uint32_t bits = mask_ge(keys + j, t) & ((1u << (n - j)) - 1);
    keep_first(x + j, bits, y + j, n - j);
    store_bits(winners + j / 8, bits);
    if (lanes != nullptr) add_bits(lanes + c, bits);
  }
}

template <class T> void forward_rows(const KWinnersArgs& a, int64_t begin, int64_t end, int64_t* counts) {
  using K = key_t<T>;
  const int64_t padded = (a.n + kLanes - 1) / kLanes * kLanes, bytes = padded / 8;
  K* keys = static_cast<K*>(scratch(kKeys, size_t(padded) * sizeof(K)));
  K* room = static_cast<K*>(scratch(kRoom, size_t(padded + kLanes) * sizeof(K)));
  int64_t* ties = static_cast<int64_t*>(scratch(kCounts, size_t(a.channels + kLanes) * 12));
  // Lane counters serve where a vector of units never wraps around the channels.
  const bool by_lane = a.inner == 1 && (a.channels == a.n || a.channels % kLanes == 0);
  int32_t* lanes = by_lane ? reinterpret_cast<int32_t*>(ties + a.channels) : nullptr;
  if (by_lane) std::memset(lanes, 0, size_t(a.channels + kLanes) * 4 - 32);
  Guess<K> guess{};
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(a.x) + row * a.n;
    T* y = static_cast<T*>(a.y) + row * a.n;
    uint8_t* winners = a.winners + row * bytes;
    K lo, hi, t;
    if (a.factors != nullptr) make_keys<T, true>(x, a.factors, a.n, keys, lo, hi);
    else make_keys<T, false>(x, nullptr, a.n, keys, lo, hi);
    if (a.k == 0) {
      std::memset(y, 0, size_t(a.n) * sizeof(T)), std::memset(winners, 0, size_t(bytes));
      continue;
    }
    int64_t surplus;
    t = threshold(keys, a.n, a.k, lo, hi, room, guess, surplus);
    if (surplus > 0) drop_ties(keys, a, t, surplus, ties);
    emit(x, keys, t, a.n, y, winners, lanes, a.channels);
    if (!by_lane) count_row(winners, a, counts);
  }
  if (by_lane) for (int64_t c = 0; c < a.channels; c++) counts[c] += lanes[c];
}

void forward(const KWinnersArgs& a, int64_t begin, int64_t end, int64_t* counts) {
  if (a.n == 0) return;
  // A 32-bit lane counter takes n / channels wins a row at most.
  const int64_t step = (int64_t(1) << 30) / (a.n / a.channels + 1) + 1;
  for (int64_t row = begin; row < end; row += step)
    dispatch(a.dtype, [&]<class T>() { forward_rows<T>(a, row, row + step < end ? row + step : end, counts); });
}

template <class T>
SPARSEKERN_INLINE void backward_rows(const T* grad_y, const uint8_t* winners, T* grad_x, int64_t n, int64_t begin,
                                     int64_t end) {
  const int64_t bytes = (n + kLanes - 1) / kLanes * 2;
  for (int64_t row = begin; row < end; row++) {
    const T* g = grad_y + row * n;
    T* out = grad_x + row * n;
    const uint8_t* w = winners + row * bytes;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) keep(g + j, load_bits(w + j / 8), out + j);
    if (j < n) keep_first(g + j, load_bits(w + j / 8), out + j, n - j);
  }
}

void backward(DType dtype, const void* grad_y, const uint8_t* winners, void* grad_x, int64_t n, int64_t begin,
              int64_t end) {
  dispatch(dtype, [&]<class T>() {
    backward_rows(static_cast<const T*>(grad_y), winners, static_cast<T*>(grad_x), n, begin, end);
  });
}

void update(float* duty_cycle, const int64_t* counts, int64_t channels, double keep, double divisor) {
  for (int64_t c = 0; c < channels; c++)
    duty_cycle[c] = float(double(duty_cycle[c]) * keep + double(counts[c]) / divisor);
}

} // namespace

const KWinnersKernels SPARSEKERN_TABLE(k_winners) = {
    boost_factors, forward, backward, forward_pooled, backward_pooled, moments, norm_grad_sums, norm_grad, update};

} // namespace sparsekern
