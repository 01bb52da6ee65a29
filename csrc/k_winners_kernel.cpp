// k-winners, one row at a time: integer keys of the boosted units, the exact threshold (k_winners_select.h), then output,
// winners' bits and counts in one pass.
#include "k_winners.h"

#include <utility>

#include "k_winners_select.h"

namespace sparsekern {
namespace {

enum Slot { kKeys, kRoom, kCounts, kPooled };

template <class T> struct key_for { using type = int32_t; };
template <> struct key_for<double> { using type = int64_t; };
template <class T> using key_t = typename key_for<T>::type;

constexpr int kFactors = kRegLanes<double>;
using factors_t = reg<double>;
using factor_bits_t = reg<int64_t>;
typedef float narrow_t __attribute__((vector_size(4 * kFactors)));

SPARSEKERN_INLINE factors_t multiply_add(factors_t a, factors_t b, factors_t c) {
#if defined(__AVX512F__)
  return (factors_t)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (factors_t)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// exp in double to about 1 ulp: 2^n times the Taylor series on |r| <= ln(2)/2, whose first dropped term is below 2^-57.
// The result is rounded to float, where every body agrees.
SPARSEKERN_INLINE factors_t exp_double(factors_t x) {
  x = x < -700 ? factors_t{} - 700 : x; // beyond, float is 0 or infinite all the same; NaN stays
  x = x > 700 ? factors_t{} + 700 : x;
  const factors_t shifted = x * 1.4426950408889634 + 0x1.8p52; // the integer is in the low bits
  const factors_t n = shifted - 0x1.8p52;
  const factors_t r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33; // ln(2) in two parts, the first short
  constexpr double kSeries[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
  factors_t p = factors_t{} + 1.0 / 6227020800;
  for (const double c : kSeries) p = multiply_add(p, r, factors_t{} + c);
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

// Keys of a row, padded to whole vectors, and the range that they lie in.
template <class T, bool kBoosted>
SPARSEKERN_INLINE void make_keys(const T* x, const float* factors, int64_t n, key_t<T>* keys, key_t<T>& lo, key_t<T>& hi) {
  using K = key_t<T>;
  using A = acc_t<T>;
  constexpr int kWidth = kRegLanes<K>;
  reg<K> low = reg<K>{} + key_traits<K>::nan, high = reg<K>{} + key_traits<K>::lowest;
  const auto some = [&](const T* x, const float* factors, int64_t at) {
    reg<A> v = load_reg(x);
    if constexpr (kBoosted) v *= load_reg_as<A>(factors);
    const reg<K> key = key_of<K>(v);
    store_keys(keys + at, key);
    return key;
  };
  const auto widen = [&](reg<K> key) { low = key < low ? key : low, high = key > high ? key : high; };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kWidth) widen(some(x + j, factors + j, j));
  if (whole < n) {
    T rest[kLanes] = {};
    float factors_rest[kLanes] = {};
    std::memcpy(rest, x + whole, size_t(n - whole) * sizeof(T));
    if constexpr (kBoosted) std::memcpy(factors_rest, factors + whole, size_t(n - whole) * sizeof(float));
    for (int i = 0; i < kLanes; i += kWidth) some(rest + i, factors_rest + i, whole + i);
    pad(keys, n);
    for (int64_t j = whole; j < n; j++) {
      low[0] = keys[j] < low[0] ? keys[j] : low[0];
      high[0] = keys[j] > high[0] ? keys[j] : high[0];
    }
  }
  lo = low[0], hi = high[0];
  for (int i = 1; i < kWidth; i++) {
    lo = low[i] < lo ? low[i] : lo;
    hi = high[i] > hi ? high[i] : hi;
  }
}

template <class K> SPARSEKERN_INLINE uint32_t mask_eq(const K* keys, K t) {
  return mask_ge(keys, t) & ~(t == key_traits<K>::nan ? 0 : mask_ge(keys, K(t + 1)));
}

// Lowers the last `surplus` of the keys that equal t to t - 1.
template <class K> void drop_last(K* keys, int64_t n, K t, int64_t surplus) {
  for (int64_t j = (n - 1) / kLanes * kLanes; surplus > 0; j -= kLanes) {
    uint32_t bits = mask_eq(keys + j, t);
    if (__builtin_popcount(bits) <= surplus) {
      for (int i = 0; i < kLanes; i += kRegLanes<K>) {
        const reg<K> v = load_keys(keys + j + i);
        store_keys(keys + j + i, v + (reg<K>)(v == t)); // true is -1
      }
      surplus -= __builtin_popcount(bits);
    } else {
      for (; surplus > 0; surplus--) {
        const int last = 31 - __builtin_clz(bits);
        keys[j + last] = t - 1;
        bits &= ~(1u << last);
      }
    }
  }
}

// Lowers `surplus` of the keys that equal t to t - 1: the last ones in channel-major order, so that the lowest index wins.
template <class K>
void drop_ties(K* keys, const KWinnersArgs& a, K t, int64_t surplus, int64_t* ties /* (channels,) */) {
  if (a.channels * a.inner >= a.n) return drop_last(keys, a.n, t, surplus); // memory order is channel-major
  for (int64_t c = 0; c < a.channels; c++) ties[c] = 0;
  for (int64_t j = 0; j < a.n; j += kLanes)
    for (uint32_t bits = mask_eq(keys + j, t); bits != 0; bits &= bits - 1)
      ties[(j + __builtin_ctz(bits)) / a.inner % a.channels]++;
  int64_t cut = a.channels - 1; // channels above it lose all their ties, it loses the last `surplus`
  for (; ties[cut] < surplus; cut--) surplus -= ties[cut];
  for (int64_t j = (a.n - 1) / kLanes * kLanes; j >= 0; j -= kLanes)
    for (uint32_t bits = mask_eq(keys + j, t); bits != 0;) {
      const int last = 31 - __builtin_clz(bits);
      const int64_t channel = (j + last) / a.inner % a.channels;
      bits &= ~(1u << last);
      if (channel > cut || (channel == cut && surplus-- > 0)) keys[j + last] = t - 1;
    }
}

// All ones in the lanes of a register whose bit is set, from the lowest bit on.
template <class U> SPARSEKERN_INLINE reg<U> lanes_of(uint32_t bits) {
  reg<U> lane;
  for (int i = 0; i < kRegLanes<U>; i++) lane[i] = U(1u << i);
  return (reg<U>)((lane & (reg<U>{} + U(bits))) != 0);
}

// Sixteen of x where the bit is set, 0 elsewhere.
template <class T> SPARSEKERN_INLINE void keep(const T* x, uint32_t bits, T* y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_si256((__m256i*)y, _mm256_maskz_loadu_epi16(__mmask16(bits), x));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_si512(y, _mm512_maskz_loadu_epi32(__mmask16(bits), x));
  } else {
    _mm512_storeu_si512(y, _mm512_maskz_loadu_epi64(__mmask8(bits), x));
    _mm512_storeu_si512(y + 8, _mm512_maskz_loadu_epi64(__mmask8(bits >> 8), x + 8));
  }
#else
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  for (int i = 0; i < kLanes; i += kRegLanes<U>) {
    reg<U> v;
    std::memcpy(&v, x + i, sizeof v);
    v &= lanes_of<U>(bits >> i);
    std::memcpy(y + i, &v, sizeof v);
  }
#endif
}
template <class T> SPARSEKERN_INLINE void keep_first(const T* x, uint32_t bits, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = (bits >> i) & 1 ? x[i] : T{};
}

SPARSEKERN_INLINE void add_bits(int32_t* counts, uint32_t bits) {
#if defined(__AVX512F__)
  const __m512i c = _mm512_loadu_si512(counts);
  _mm512_storeu_si512(counts, _mm512_mask_add_epi32(c, __mmask16(bits), c, _mm512_set1_epi32(1)));
#else
  for (int i = 0; i < kLanes; i += kRegLanes<int32_t>)
    store_keys(counts + i, load_keys(counts + i) - lanes_of<int32_t>(bits >> i));
#endif
}

SPARSEKERN_INLINE void store_bits(uint8_t* p, uint32_t bits) { p[0] = uint8_t(bits), p[1] = uint8_t(bits >> 8); }
SPARSEKERN_INLINE uint32_t load_bits(const uint8_t* p) { return p[0] | uint32_t(p[1]) << 8; }

// Set bits among begin..end.
SPARSEKERN_INLINE int64_t count_bits(const uint8_t* winners, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t u = begin; u < end;) {
    if (u % 8 == 0 && u + 64 <= end) {
      uint64_t word;
      std::memcpy(&word, winners + u / 8, 8);
      total += __builtin_popcountll(word), u += 64;
    } else {
      const int64_t stop = (u / 8 + 1) * 8 < end ? (u / 8 + 1) * 8 : end;
      const uint32_t byte = winners[u / 8] >> (u % 8);
      total += __builtin_popcount(byte & ((1u << (stop - u)) - 1)), u = stop;
    }
  }
  return total;
}

// f(unit, channel) for each set bit of a row, in order.
template <class F>
SPARSEKERN_INLINE void for_winners(const uint8_t* winners, int64_t n, int64_t channels, int64_t inner, const F& f) {
  int64_t channel = 0, end = inner; // with inner = 1 `channel` is the first unit of the pixel; no divisions
  for (int64_t j = 0; j < n; j += kLanes)
    for (uint32_t bits = load_bits(winners + j / 8); bits != 0; bits &= bits - 1) {
      const int64_t u = j + __builtin_ctz(bits);
      if (inner == 1) {
        for (; u >= channel + channels; channel += channels) {}
        f(u, u - channel);
      } else {
        for (; u >= end; end += inner) channel = channel + 1 == channels ? 0 : channel + 1;
        f(u, channel);
      }
    }
}

// The wins of a row by its bits, where they were not counted lane by lane.
void count_row(const uint8_t* winners, const KWinnersArgs& a, int64_t* counts) {
  if (a.inner >= kLanes) {
    for (int64_t u = 0, c = 0; u < a.n; u += a.inner, c = c + 1 == a.channels ? 0 : c + 1)
      counts[c] += count_bits(winners, u, u + a.inner < a.n ? u + a.inner : a.n);
    return;
  }
  for_winners(winners, a.n, a.channels, a.inner, [&](int64_t, int64_t channel) { counts[channel]++; });
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

// Element `column` of each of a register's windows along a line: neighbours' windows are kStep apart, 1 or 2.
template <int kStep, class T, int... kLane>
SPARSEKERN_INLINE reg<acc_t<T>> load_column(const T* x, int column, std::integer_sequence<int, kLane...>) {
  const reg<acc_t<T>> a = load_reg(x);
  if constexpr (kStep == 1) return a;
  const reg<acc_t<T>> b = load_reg(x + sizeof...(kLane));
  return column == 0 ? __builtin_shufflevector(a, b, (2 * kLane)...) : __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

// Maxima of n windows of pool x pool elements and where they are taken from. The first window begins at x[at], the next
// one kStep further; a window's elements are `column` and `row` apart. As in PyTorch, the first maximum counts and NaN is
// above all; with kStep = 2 columns are neighbours and pool is 2.
template <int kStep, class T>
SPARSEKERN_INLINE void pool_line(const T* x, int64_t at, int64_t n, int64_t step, int64_t pool, int64_t column,
                                 int64_t row, acc_t<T>* most, int32_t* taken) {
  using A = acc_t<T>;
  using K = key_t<T>;
  constexpr int kWidth = kRegLanes<A>;
  constexpr auto kAll = std::make_integer_sequence<int, kWidth>();
  int64_t i = 0;
  if constexpr (kStep > 0) {
    reg<K> lane;
    for (int l = 0; l < kWidth; l++) lane[l] = K(l * kStep);
    for (; i + kWidth <= n; i += kWidth) {
      const int64_t begin = at + i * kStep;
      reg<A> best = load_column<kStep>(x + begin, 0, kAll);
      reg<K> from = lane + K(begin);
      for (int64_t dy = 0; dy < pool; dy++)
        for (int64_t dx = 0; dx < pool; dx++) {
          const int64_t other = begin + dy * row + (kStep == 1 ? dx * column : 0);
          const reg<A> v = load_column<kStep>(x + other, int(dx), kAll);
          const reg<K> larger = (reg<K>)((v > best) | (v != v));
          best = larger ? v : best;
          from = larger ? lane + K(begin + dy * row + dx * column) : from;
        }
      std::memcpy(most + i, &best, sizeof best);
      for (int l = 0; sizeof(K) > 4 && l < kWidth; l++) taken[i + l] = int32_t(from[l]);
      if constexpr (sizeof(K) == 4) std::memcpy(taken + i, &from, sizeof from);
    }
  }
  for (; i < n; i++) {
    int64_t from = at + i * step;
    A best = to_acc(x[from]);
    for (int64_t dy = 0; dy < pool; dy++)
      for (int64_t dx = 0; dx < pool; dx++) {
        const int64_t other = at + i * step + dy * row + dx * column;
        const A v = to_acc(x[other]);
        const bool larger = (v > best) | (v != v);
        best = larger ? v : best;
        from = larger ? other : from;
      }
    most[i] = best;
    taken[i] = int32_t(from);
  }
}

// The same for n windows of 2 x 2 in two rows, `row` apart; what fills no register is copied into a whole one first, as rows
// of feature maps are short.
template <class T>
void pool_pairs(const T* x, int64_t at, int64_t n, int64_t row, acc_t<T>* most, int32_t* taken) {
  using A = acc_t<T>;
  constexpr int kWidth = kRegLanes<A>;
  const int64_t whole = n / kWidth * kWidth, rest = n - whole;
  pool_line<2>(x, at, whole, 2, 2, 1, row, most, taken);
  if (rest == 0) return;
  T pairs[4 * kWidth] = {};
  A rest_most[kWidth];
  int32_t rest_taken[kWidth];
  const int64_t begin = at + 2 * whole;
  for (int64_t i = 0; i < 2; i++) std::memcpy(pairs + i * 2 * kWidth, x + begin + i * row, size_t(2 * rest) * sizeof(T));
  pool_line<2>(pairs, 0, kWidth, 2, 2, 1, 2 * kWidth, rest_most, rest_taken);
  for (int64_t i = 0; i < rest; i++) {
    most[whole + i] = rest_most[i];
    const int64_t from = rest_taken[i];
    taken[whole + i] = int32_t(begin + (from < 2 * kWidth ? from : from - 2 * kWidth + row));
  }
}

// A map's pooled units, in its own order.
template <class T> void pool_map(const T* x, const PooledArgs& a, acc_t<T>* most, int32_t* taken) {
  const int64_t P = a.H / a.pool, Q = a.W / a.pool;
  if (a.channels_last)
    for (int64_t p = 0; p < P; p++)
      for (int64_t q = 0; q < Q; q++, most += a.C, taken += a.C) {
        const int64_t at = (p * a.W + q) * a.pool * a.C;
        if (a.pool == 2) pool_line<1>(x, at, a.C, 1, 2, a.C, a.W * a.C, most, taken);
        else pool_line<1>(x, at, a.C, 1, a.pool, a.C, a.W * a.C, most, taken);
      }
  else
    for (int64_t c = 0; c < a.C; c++)
      for (int64_t p = 0; p < P; p++, most += Q, taken += Q) {
        const int64_t at = (c * a.H + p * a.pool) * a.W;
        if (a.pool == 2) pool_pairs(x, at, Q, a.W, most, taken);
        else pool_line<0>(x, at, Q, a.pool, a.pool, 1, a.W, most, taken);
      }
}

// Pooled values normalised and rounded to T, in place.
template <class T> void normalise(const PooledArgs& a, acc_t<T>* most) {
  using A = acc_t<T>;
  const A *mean = static_cast<const A*>(a.mean), *scale = static_cast<const A*>(a.scale);
  const auto rounded = [](A v) {
    T stored;
    from_acc(v, stored);
    return to_acc(stored);
  };
  const int64_t locations = a.rows.n / a.C;
  if (a.channels_last)
    for (int64_t p = 0; p < locations; p++, most += a.C)
      for (int64_t c = 0; c < a.C; c++) most[c] = rounded((most[c] - mean[c]) * scale[c]);
  else
    for (int64_t c = 0; c < a.C; c++, most += locations)
      for (int64_t p = 0; p < locations; p++) most[p] = rounded((most[p] - mean[c]) * scale[c]);
}

template <class T> void forward_pooled_rows(const PooledArgs& a, int64_t begin, int64_t end, int64_t* counts) {
  using A = acc_t<T>;
  using K = key_t<T>;
  const int64_t n = a.rows.n, k = a.rows.k, map = a.C * a.H * a.W;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes, bytes = padded / 8;
  K* keys = static_cast<K*>(scratch(kKeys, size_t(padded) * sizeof(K)));
  K* room = static_cast<K*>(scratch(kRoom, size_t(padded + kLanes) * sizeof(K)));
  int32_t* places = reinterpret_cast<int32_t*>(room); // the candidates are gone when the winners' places come
  int64_t* ties = static_cast<int64_t*>(scratch(kCounts, size_t(a.C) * 12));
  int32_t* lanes = a.channels_last && a.C % kLanes == 0 ? reinterpret_cast<int32_t*>(ties + a.C) : nullptr;
  if (lanes != nullptr) std::memset(lanes, 0, size_t(a.C) * sizeof(int32_t));
  A* most = static_cast<A*>(scratch(kPooled, size_t(padded) * (sizeof(A) + sizeof(int32_t))));
  int32_t* taken = reinterpret_cast<int32_t*>(most + padded);
  Guess<K> guess{};
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(a.rows.x) + row * map;
    T* y = static_cast<T*>(a.rows.y) + row * n;
    uint8_t* winners = a.rows.winners + row * bytes;
    if (k == 0) {
      std::memset(y, 0, size_t(n) * sizeof(T)), std::memset(winners, 0, size_t(bytes));
      continue;
    }
    pool_map(x, a, most, taken);
    if (a.mean != nullptr) normalise<T>(a, most);
    K lo, hi;
    if (a.rows.factors != nullptr) make_keys<A, true>(most, a.rows.factors, n, keys, lo, hi);
    else make_keys<A, false>(most, nullptr, n, keys, lo, hi);
    int64_t surplus;
    const K t = threshold(keys, n, k, lo, hi, room, guess, surplus);
    if (surplus > 0) drop_ties(keys, a.rows, t, surplus, ties);
    // Without branches on single units, which would be mispredicted.
    int32_t* offsets = a.offsets + row * k;
    int64_t count = 0;
    for (int64_t j = 0; j < padded; j += kLanes) {
      const uint32_t bits = mask_ge(keys + j, t);
      store_bits(winners + j / 8, bits);
      count += compress(taken + j, bits, places + count);
      if constexpr (std::is_same_v<T, A>) keep(most + j, bits, most + j);
      if (lanes != nullptr) add_bits(lanes + j % a.C, bits);
    }
    std::memcpy(offsets, places, size_t(k) * sizeof(int32_t));
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(y, most, size_t(n) * sizeof(T));
    } else {
      std::memset(y, 0, size_t(n) * sizeof(T));
      for (int64_t j = 0; j < n; j += kLanes)
        for (uint32_t bits = load_bits(winners + j / 8); bits != 0; bits &= bits - 1)
          if (a.mean != nullptr) from_acc(most[j + __builtin_ctz(bits)], y[j + __builtin_ctz(bits)]);
          else y[j + __builtin_ctz(bits)] = x[*offsets++];
    }
    if (lanes == nullptr) count_row(winners, a.rows, counts);
  }
  for (int64_t c = 0; lanes != nullptr && c < a.C; c++) counts[c] += lanes[c];
}

void forward_pooled(const PooledArgs& a, int64_t begin, int64_t end, int64_t* counts) {
  if (a.rows.n == 0) return;
  // A 32-bit lane counter takes n / channels wins a row at most.
  const int64_t step = (int64_t(1) << 30) / (a.rows.n / a.C + 1) + 1;
  for (int64_t row = begin; row < end; row += step)
    dispatch(a.rows.dtype, [&]<class T>() { forward_pooled_rows<T>(a, row, row + step < end ? row + step : end, counts); });
}

void backward_pooled(DType dtype, const void* grad_y, const uint8_t* winners, const int32_t* offsets, void* grad_x,
                     int64_t n, int64_t k, int64_t map, int64_t begin, int64_t end) {
  dispatch(dtype, [&]<class T>() {
    const int64_t bytes = (n + kLanes - 1) / kLanes * 2;
    for (int64_t row = begin; row < end; row++) {
      const T* g = static_cast<const T*>(grad_y) + row * n;
      T* out = static_cast<T*>(grad_x) + row * map;
      const int32_t* offset = offsets + row * k;
      std::memset(out, 0, size_t(map) * sizeof(T));
      for (int64_t j = 0; j < n; j += kLanes)
        for (uint32_t bits = load_bits(winners + row * bytes + j / 8); bits != 0; bits &= bits - 1)
          out[*offset++] = g[j + __builtin_ctz(bits)];
    }
  });
}

// One sample's channel means and sums of squared deviations from them: two passes while it is in the cache.
template <class T>
void moments_of(const T* x, bool channels_last, int64_t C, int64_t pixels, double* mean, double* squares, acc_t<T>* sums) {
  using A = acc_t<T>;
  if (!channels_last) {
    for (int64_t c = 0; c < C; c++, x += pixels) {
      for (int pass = 0; pass < 2; pass++) {
        const vec<A> centre = splat(pass == 0 ? A(0) : A(mean[c]));
        vec<A> total = {};
        for (int64_t p = 0; p < pixels; p += kLanes) {
          const int64_t n = pixels - p < kLanes ? pixels - p : kLanes;
          vec<A> v = load_first(x + p, n);
          if (pass == 1) {
            v -= centre;
            for (int64_t l = n; l < kLanes; l++) v[l] = 0;
            v *= v;
          }
          total += v;
        }
        (pass == 0 ? mean : squares)[c] = double(sum<A>(total)) / (pass == 0 ? double(pixels) : 1.0);
      }
    }
    return;
  }
  A* centres = sums + C;
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t c = 0; c < C; c++) sums[c] = 0;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t c = 0; c < C; c++) {
        const A v = to_acc(x[p * C + c]);
        if (pass == 0) sums[c] += v;
        else sums[c] += (v - centres[c]) * (v - centres[c]);
      }
    for (int64_t c = 0; c < C; c++) {
      (pass == 0 ? mean : squares)[c] = double(sums[c]) / (pass == 0 ? double(pixels) : 1.0);
      if (pass == 0) centres[c] = A(mean[c]);
    }
  }
}

void moments(DType dtype, const void* x, bool channels_last, int64_t C, int64_t pixels, double* moments, int64_t begin,
             int64_t end) {
  dispatch(dtype, [&]<class T>() {
    auto* sums = static_cast<acc_t<T>*>(scratch(kPooled, size_t(2 * C) * sizeof(acc_t<T>)));
    for (int64_t row = begin; row < end; row++)
      moments_of(static_cast<const T*>(x) + row * C * pixels, channels_last, C, pixels, moments + row * 2 * C,
                 moments + (row * 2 + 1) * C, sums);
  });
}

void norm_grad_sums(const NormGradArgs& a, double* sums, int64_t begin, int64_t end) {
  const int64_t bytes = (a.n + kLanes - 1) / kLanes * 2;
  dispatch(a.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; row++) {
      const T *g = static_cast<const T*>(a.grad_y) + row * a.n, *y = static_cast<const T*>(a.y) + row * a.n;
      double* sum = sums + row * 2 * a.C;
      for (int64_t c = 0; c < 2 * a.C; c++) sum[c] = 0;
      for_winners(a.winners + row * bytes, a.n, a.C, a.inner, [&](int64_t u, int64_t c) {
        const double gradient = double(to_acc(g[u]));
        sum[c] += gradient;
        sum[a.C + c] += gradient * double(to_acc(y[u]));
      });
    }
  });
}

void norm_grad(const NormGradArgs& a, const double* means, int64_t begin, int64_t end) {
  const int64_t bytes = (a.n + kLanes - 1) / kLanes * 2, map = a.C * a.pixels;
  dispatch(a.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const A *mean = static_cast<const A*>(a.mean), *scale = static_cast<const A*>(a.scale);
    A* constant = static_cast<A*>(scratch(kPooled, size_t(2 * a.C) * sizeof(A)));
    A* linear = constant + a.C; // of x in what reaches every element
    for (int64_t c = 0; c < a.C; c++) {
      linear[c] = A(-double(scale[c]) * double(scale[c]) * means[a.C + c]);
      constant[c] = A(-double(scale[c]) * means[c] + double(scale[c]) * double(scale[c]) * means[a.C + c] * double(mean[c]));
    }
    for (int64_t row = begin; row < end; row++) {
      const T *x = static_cast<const T*>(a.x) + row * map, *g = static_cast<const T*>(a.grad_y) + row * a.n;
      T* out = static_cast<T*>(a.grad_x) + row * map;
      if (a.channels_last)
        for (int64_t p = 0; p < a.pixels; p++)
          for (int64_t c = 0; c < a.C; c++) from_acc(to_acc(x[p * a.C + c]) * linear[c] + constant[c], out[p * a.C + c]);
      else
        for (int64_t c = 0; c < a.C; c++)
          for (int64_t p = c * a.pixels; p < (c + 1) * a.pixels; p++) from_acc(to_acc(x[p]) * linear[c] + constant[c], out[p]);
      const int32_t* offset = a.offsets + row * a.k;
      for_winners(a.winners + row * bytes, a.n, a.C, a.inner, [&](int64_t u, int64_t c) {
        const int64_t at = *offset++;
        from_acc(to_acc(x[at]) * linear[c] + constant[c] + scale[c] * to_acc(g[u]), out[at]);
      });
    }
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
