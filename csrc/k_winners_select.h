// Exact selection of the k-th largest of a row of integer keys, for csrc/k_winners_kernel.cpp.
#pragma once
#include <type_traits>

#include "reg.h"

namespace sparsekern {
namespace {

// Keys are signed integers in the order of the floating-point numbers they stand for; arrays of them are padded to whole
// vectors with the lowest, which stands for no number.
template <class K> struct key_traits;
template <> struct key_traits<int32_t> {
  using real = float;
  static constexpr int32_t lowest = INT32_MIN, nan = INT32_MAX;
};
template <> struct key_traits<int64_t> {
  using real = double;
  static constexpr int64_t lowest = INT64_MIN, nan = INT64_MAX;
};

template <class K> SPARSEKERN_INLINE reg<K> load_keys(const K* p) { reg<K> v; std::memcpy(&v, p, sizeof v); return v; }
template <class K> SPARSEKERN_INLINE void store_keys(K* p, reg<K> v) { std::memcpy(p, &v, sizeof v); }

// NaN becomes the highest key, -0 the key of +0.
template <class K> SPARSEKERN_INLINE reg<K> key_of(reg<typename key_traits<K>::real> x) {
  const reg<K> bits = (reg<K>)(x + 0);
  const reg<K> key = bits ^ ((bits >> (8 * sizeof(K) - 1)) & key_traits<K>::nan);
  return x != x ? reg<K>{} + key_traits<K>::nan : key;
}
template <class K> SPARSEKERN_INLINE typename key_traits<K>::real real_of(K key) {
  const K bits = key ^ ((key >> (8 * sizeof(K) - 1)) & key_traits<K>::nan);
  typename key_traits<K>::real x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Bit i is set where keys[i] >= t, i in 0..15.
SPARSEKERN_INLINE uint32_t mask_ge(const int32_t* keys, int32_t t) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(t));
#elif defined(__AVX2__)
  const __m256i below = _mm256_set1_epi32(t);
  const __m256i a = _mm256_cmpgt_epi32(below, _mm256_loadu_si256((const __m256i*)keys));
  const __m256i b = _mm256_cmpgt_epi32(below, _mm256_loadu_si256((const __m256i*)(keys + 8)));
  return 0xffffu ^ (uint32_t(_mm256_movemask_ps((__m256)a)) | uint32_t(_mm256_movemask_ps((__m256)b)) << 8);
#elif defined(__SSE2__)
  const __m128i below = _mm_set1_epi32(t);
  uint32_t bits = 0;
  for (int i = 0; i < 4; i++) {
    const __m128i less = _mm_cmpgt_epi32(below, _mm_loadu_si128((const __m128i*)(keys + 4 * i)));
    bits |= uint32_t(_mm_movemask_ps((__m128)less)) << (4 * i);
  }
  return 0xffffu ^ bits;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(keys[i] >= t) << i;
  return bits;
#endif
}
SPARSEKERN_INLINE uint32_t mask_ge(const int64_t* keys, int64_t t) {
#if defined(__AVX512F__)
  const __m512i bound = _mm512_set1_epi64(t);
  return _mm512_cmpge_epi64_mask(_mm512_loadu_si512(keys), bound) |
         uint32_t(_mm512_cmpge_epi64_mask(_mm512_loadu_si512(keys + 8), bound)) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(keys[i] >= t) << i;
  return bits;
#endif
}

// Stores the keys whose bit is set at out, in order; up to out + 16 is written, and out may be keys or lie
// below. Returns how many.
template <class K> SPARSEKERN_INLINE int64_t compress(const K* keys, uint32_t bits, K* out) {
#if defined(__AVX512F__)
  // Compressed in a register and stored whole: compressing into memory is microcoded on Zen 4.
  if constexpr (sizeof(K) == 4) {
    _mm512_storeu_si512(out, _mm512_mask_compress_epi32(fresh(), __mmask16(bits), _mm512_loadu_si512(keys)));
  } else {
    const __m512i low = _mm512_loadu_si512(keys), high = _mm512_loadu_si512(keys + 8);
    _mm512_storeu_si512(out, _mm512_mask_compress_epi64(fresh(), __mmask8(bits), low));
    out += __builtin_popcount(bits & 0xff);
    _mm512_storeu_si512(out, _mm512_mask_compress_epi64(fresh(), __mmask8(bits >> 8), high));
  }
  return __builtin_popcount(bits);
#else
  int64_t count = 0; // few are set where candidates are taken out
  for (; bits != 0; bits &= bits - 1) out[count++] = keys[__builtin_ctz(bits)];
  return count;
#endif
}

// How many of `length` keys are at least t > lowest; the padding never is.
template <class K> SPARSEKERN_INLINE int64_t count_ge(const K* keys, int64_t length, K t) {
  constexpr int kWidth = kRegLanes<K>;
  constexpr int64_t kBlock = int64_t(1) << 26; // 32-bit lanes cannot overflow
  int64_t total = 0;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t end = begin + kBlock < length ? begin + kBlock : length;
    reg<K> counts[2] = {};
    const reg<K> bound = reg<K>{} + t;
    int64_t j = begin;
    for (; j + 2 * kWidth <= end; j += 2 * kWidth) {
      counts[0] -= (reg<K>)(load_keys(keys + j) >= bound);
      counts[1] -= (reg<K>)(load_keys(keys + j + kWidth) >= bound);
    }
    for (; j < end; j += kWidth) counts[0] -= (reg<K>)(load_keys(keys + j) >= bound);
    counts[0] += counts[1];
    for (int i = 0; i < kWidth; i++) total += counts[0][i];
  }
  return total;
}

template <class K> SPARSEKERN_INLINE void pad(K* keys, int64_t length) {
  for (int64_t i = length; i % kLanes != 0; i++) keys[i] = key_traits<K>::lowest;
}

// Between `lo` and `hi`: keys of the k-th largest's neighbourhood, with how many of all keys are >= lo and > hi. The
// k-th largest is in [lo, hi]: not_below >= k > above.
template <class K> struct Bracket {
  K lo, hi;
  int64_t not_below, above;
};

// The keys of [lo, hi], in order, at out (which may be `keys` itself), and how many are above; returns how many.
template <class K>
SPARSEKERN_INLINE int64_t extract(const K* keys, int64_t length, K lo, K hi, K* out, int64_t& above) {
  int64_t count = 0;
  above = 0;
  for (int64_t j = 0; j < length; j += kLanes) {
    const uint32_t higher = hi == key_traits<K>::nan ? 0 : mask_ge(keys + j, hi + 1);
    above += __builtin_popcount(higher);
    count += compress(keys + j, mask_ge(keys + j, lo) & ~higher, out + count);
  }
  pad(out, count);
  return count;
}

// A key to split (lo, hi] at. Interpolating between the two counts and halving, in turn, takes about eight rounds for
// activations; whatever the values are, halving the integers ends it after 10 + 32 (64).
template <class K> SPARSEKERN_INLINE K split(const Bracket<K>& b, int64_t k, int round) {
  using R = typename key_traits<K>::real;
  using U = std::make_unsigned_t<K>;
  const K middle = K(U(b.lo) + (U(b.hi) - U(b.lo) - 1) / 2 + 1); // lo < middle <= hi
  if (round >= 10 || b.hi == key_traits<K>::nan) return middle;
  R part = R(0.5);
  if (round % 2 == 0) {
    part = R(b.not_below - k) / R(b.not_below - b.above);
    part = part < R(0.05) ? R(0.05) : part > R(0.95) ? R(0.95) : part;
  }
  const R low = real_of(b.lo), high = real_of(b.hi), value = low * (1 - part) + high * part;
  if (!(value > low && value <= high)) return middle; // infinities, neighbours
  const reg<K> key = key_of<K>(reg<R>{} + value);
  return key[0] > b.lo && key[0] <= b.hi ? key[0] : middle;
}

// Narrows a bracket of keys (length,) until it holds one value or exactly the k winners: then {key >= lo} has
// not_below >= k elements, and above < k of them are greater than lo if not_below > k. `removed` keys above the bracket
// are no longer among the keys. Candidates move to `room` (length + 16,) as they get fewer; keys stay as they are.
template <class K>
SPARSEKERN_INLINE void narrow(const K* keys, int64_t length, int64_t k, int64_t removed, K* room, Bracket<K>& b) {
  for (int round = 0; b.lo < b.hi && b.not_below != k; round++) {
    const K t = split(b, k, round);
    const int64_t count = count_ge(keys, length, t) + removed;
    if (count >= k) b.lo = t, b.not_below = count;
    else b.hi = t - 1, b.above = count;
    if (length > 512 && (b.not_below - b.above) * 4 <= length) {
      int64_t above;
      length = extract(keys, length, b.lo, b.hi, room, above);
      keys = room;
      removed = b.above;
    }
  }
}

// The keys of [lo, hi] at room, and the bracket narrowed by their number: returns that number if the k-th largest is
// among them, and else 0, when all n keys stay candidates.
template <class K>
SPARSEKERN_INLINE int64_t try_range(const K* keys, int64_t n, int64_t k, K lo, K hi, K* room, Bracket<K>& b) {
  int64_t above;
  const int64_t inside = extract(keys, n, lo, hi, room, above);
  if (above >= k) {
    b.lo = hi + 1, b.not_below = above;
    return 0;
  }
  if (above + inside < k) {
    b.hi = lo - 1, b.above = above + inside;
    return 0;
  }
  b = {lo, hi, above + inside, above};
  return inside;
}

constexpr int64_t kSampled = 4096; // rows longer than this are bracketed by a sample first
constexpr int64_t kSample = 1024;  // its size, up to twice that

// The range that a sample of the keys suggests. Ranks alone matter, so that no distribution of the values is bad.
template <class K>
SPARSEKERN_INLINE int64_t try_sample(const K* keys, int64_t n, int64_t k, K* room, Bracket<K>& b) {
  K sample[2 * kSample + kLanes], sample_room[2 * kSample + 2 * kLanes];
  const int64_t stride = (n / kSample) | 1; // odd: it passes through all channels of a channels-last row
  int64_t size = 0;
  for (int64_t i = stride / 2; i < n && size < 2 * kSample; i += stride) sample[size++] = keys[i];
  pad(sample, size);
  const double rank = double(k) * double(size) / double(n);
  const double margin = 4 * __builtin_sqrt(rank * (1 - rank / double(size))) + 8; // 4 deviations of the rank
  K ends[2] = {b.lo, b.hi};
  for (int side = 0; side < 2; side++) {
    const int64_t at = int64_t(side == 0 ? rank + margin : rank - margin);
    if (at < 1 || at > size) continue;
    Bracket<K> s = {b.lo, b.hi, size, 0};
    narrow(sample, size, at, 0, sample_room, s);
    ends[side] = s.lo;
  }
  return try_range(keys, n, k, ends[0], ends[1], room, b);
}

constexpr int64_t kGuessed = 256; // rows shorter than this are not worth a guess

// Where the thresholds of the last rows lay, and how far apart: rows of a batch are alike, so that one pass around the
// last threshold leaves few candidates. It never changes the result.
template <class K> struct Guess {
  K last;
  uint64_t spread;
  int rows = 0;

  bool ready(int64_t n) const { return rows > 1 && n >= kGuessed; }
  K low(K lo) const { return uint64_t(last) - uint64_t(lo) > spread && last > lo ? K(last - K(spread)) : lo; }
  K high(K hi) const { return uint64_t(hi) - uint64_t(last) > spread && hi > last ? K(last + K(spread)) : hi; }
  void learn(K t) {
    const uint64_t distance = t > last ? uint64_t(t) - uint64_t(last) : uint64_t(last) - uint64_t(t);
    if (rows > 0) spread = rows == 1 ? 2 * distance : spread / 2 + distance + distance / 2;
    if (spread > uint64_t(key_traits<K>::nan) / 2) spread = uint64_t(key_traits<K>::nan) / 2;
    last = t, rows++;
  }
};

// The threshold of the k winners among n keys, 1 <= k <= n, all in [lo, hi]: {key >= threshold} has k + surplus elements,
// and if surplus > 0 all that surplus is equal to the threshold. room (n + 16,) is overwritten.
template <class K>
K threshold(const K* keys, int64_t n, int64_t k, K lo, K hi, K* room, Guess<K>& guess, int64_t& surplus) {
  Bracket<K> b = {lo, hi, n, 0};
  int64_t candidates = 0;
  if (guess.ready(n) && guess.last >= lo && guess.last <= hi)
    candidates = try_range(keys, n, k, guess.low(lo), guess.high(hi), room, b);
  if (candidates == 0 && n > kSampled) candidates = try_sample(keys, n, k, room, b);
  if (candidates > 0) narrow(room, candidates, k, b.above, room, b);
  else narrow(keys, n, k, 0, room, b);
  guess.learn(b.lo);
  surplus = b.not_below - k;
  return b.lo;
}

} // namespace
} // namespace sparsekern
