// Non-zeros and where what they multiply lies, as loops read them.
#pragma once
#include "reg.h"

namespace sparsekern {
namespace {

// Value and place side by side, since loops that load a weight for every product are bound by their loads: a value and a
// place of its own are two more for every eight to ten.
template <class A> struct Entry {
  using Place = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  A value;
  Place place; // not negative
};

// The place of an entry, and its value in every lane.
template <class A> SPARSEKERN_INLINE int64_t read_entry(const Entry<A>& entry, reg<A>& value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) { // one load, as a number
    uint64_t both;
    std::memcpy(&both, &entry, sizeof both);
    value = (reg<A>)_mm512_set1_epi32(int32_t(both));
    return int64_t(both >> 32);
  }
#endif
  value = entry.value - reg<A>{};
  return entry.place;
}

// The registers for weights and the sums of their gradient that stay while entries pass, beside an entry's value, what it
// meets, and, where the input's gradient is wanted too, its two sums.
#if defined(__AVX512F__)
constexpr int most_registers(bool both) { return both ? 28 : 30; }
#else
constexpr int most_registers(bool both) { return both ? 12 : 14; }
#endif

constexpr int kEntrySums = 4; // of the products that an entry's gradient is the sum of: they are added last

// to (kEntrySums,) += the lanes of v, so many of them to each.
template <class A> SPARSEKERN_INLINE void add_sums(A* to, reg<A> v) {
  typedef A four __attribute__((vector_size(kEntrySums * sizeof(A))));
  four sum, part;
  std::memcpy(&sum, to, sizeof sum);
  if constexpr (kRegLanes<A> == 16) {
    typedef A eight __attribute__((vector_size(8 * sizeof(A))));
    const eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    part = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else if constexpr (kRegLanes<A> == 8) {
    part = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else if constexpr (kRegLanes<A> == 4) {
    part = v;
  } else {
    part = four{v[0], v[1], 0, 0};
  }
  sum += part;
  std::memcpy(to, &sum, sizeof sum);
}

#if defined(__AVX512F__)
// A mask as a number, in a register: where it widens one, GCC 12 may write the mask's two bytes to the stack and read eight.
SPARSEKERN_INLINE uint32_t bits_of(__mmask16 mask) {
  uint32_t bits = mask;
  asm("" : "+r"(bits));
  return bits;
}
#endif

// A bit for each of sixteen values that is not zero (NaN is not).
SPARSEKERN_INLINE uint32_t nonzero_bits(const float* p) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  bits = bits_of(_mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_setzero_ps(), _CMP_NEQ_UQ));
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8)
    bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p + i), _mm256_setzero_ps(), _CMP_NEQ_UQ))) << i;
#else
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(p[i] != 0) << i;
#endif
  return bits;
}
SPARSEKERN_INLINE uint32_t nonzero_bits(const double* p) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kLanes; i += 8)
    bits |= bits_of(_mm512_cmp_pd_mask(_mm512_loadu_pd(p + i), _mm512_setzero_pd(), _CMP_NEQ_UQ)) << i;
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 4)
    bits |= uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(p + i), _mm256_setzero_pd(), _CMP_NEQ_UQ))) << i;
#else
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(p[i] != 0) << i;
#endif
  return bits;
}

// Writes the non-zeros of the first n (1..16) of p, of which element i has place (first + i) * scale; returns how many. Up
// to 16 entries are overwritten.
template <class T>
SPARSEKERN_INLINE int32_t list_nonzeros(const T* p, int64_t n, int64_t first, int64_t scale, Entry<acc_t<T>>* entries) {
  using A = acc_t<T>;
  const vec<A> v = load_first(p, n);
#if defined(__AVX512F__)
  // Compressed in registers and stored whole: a compressing store is microcoded on some processors.
  if constexpr (sizeof(A) == 4) {
    const __mmask16 mask = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i steps = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(scale))); // out of the caller's loop
    const __m512i place = _mm512_add_epi32(steps, _mm512_set1_epi32(int32_t(first * scale)));
    const __m512i places = _mm512_mask_compress_epi32(fresh(), mask, place);
    const __m512i values = _mm512_mask_compress_epi32(fresh(), mask, (__m512i)v);
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_si512(entries, _mm512_permutex2var_epi32(values, low, places));
    _mm512_storeu_si512(entries + 8, _mm512_permutex2var_epi32(values, high, places));
    return __builtin_popcount(mask);
  }
#endif
  A values[kLanes];
  store(values, v);
  int32_t count = 0;
  for (uint32_t bits = nonzero_bits(values); bits != 0; bits &= bits - 1, count++) {
    const int i = __builtin_ctz(bits);
    entries[count] = {values[i], typename Entry<A>::Place((first + i) * scale)};
  }
  return count;
}

} // namespace
} // namespace sparsekern
