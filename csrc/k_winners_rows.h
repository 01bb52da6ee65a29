// Keys, ties, bits and counts of a row, for csrc/k_winners_kernel.cpp.
#pragma once
#include "k_winners.h"
#include "k_winners_select.h"

namespace sparsekern {
namespace {

enum Slot { kKeys, kRoom, kCounts, kPooled };

template <class T> struct key_for { using type = int32_t; };
template <> struct key_for<double> { using type = int64_t; };
template <class T> using key_t = typename key_for<T>::type;

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

} // namespace
} // namespace sparsekern
