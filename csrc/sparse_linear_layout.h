// The weights laid out as a dense (I, O) matrix, and collected from one.
#pragma once
#include "sparse_linear_bits.h"
#include "sparse_linear_panels.h"

namespace sparsekern {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// The elements at p in order, at the lanes of the mask; zeros elsewhere. Reads as many as the mask has, or all sixteen
// (kWhole), which is twice as fast.
template <bool kWhole> SPARSEKERN_INLINE void expand_lanes(uint32_t mask, const float* p, float* out) {
  const __mmask16 first = __mmask16((1u << __builtin_popcount(mask)) - 1);
  const __m512 v = kWhole ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first, p);
  _mm512_storeu_ps(out, _mm512_mask_expand_ps((__m512)fresh(), __mmask16(mask), v));
}
template <bool kWhole> SPARSEKERN_INLINE void expand_lanes(uint32_t mask, const uint16_t* p, uint16_t* out) {
  const __mmask16 first = __mmask16((1u << __builtin_popcount(mask)) - 1);
  const __m256i v = kWhole ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first, p);
  const __m512i spread = _mm512_mask_expand_epi32(fresh(), __mmask16(mask), _mm512_cvtepu16_epi32(v));
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(spread));
}
SPARSEKERN_INLINE void collect_lanes(uint32_t mask, const float* p, float* out) {
  const __mmask16 first = __mmask16((1u << __builtin_popcount(mask)) - 1);
  _mm512_mask_storeu_ps(out, first, _mm512_mask_compress_ps((__m512)fresh(), __mmask16(mask), _mm512_loadu_ps(p)));
}
SPARSEKERN_INLINE void collect_lanes(uint32_t mask, const uint16_t* p, uint16_t* out) {
  const __mmask16 first = __mmask16((1u << __builtin_popcount(mask)) - 1);
  const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  _mm256_mask_storeu_epi16(out, first, _mm512_cvtepi32_epi16(_mm512_mask_compress_epi32(fresh(), __mmask16(mask), v)));
}

// The same for `words` times 64 outputs in two bytes, by instructions of newer processors. Reads up to 32 elements from any of
// an input's weights on. Returns where the next ones are.
#define SPARSEKERN_WORDS __attribute__((target("avx512vbmi2")))
inline bool has_words() {
  static const bool has = __builtin_cpu_supports("avx512vbmi2");
  return has;
}
SPARSEKERN_WORDS inline uint16_t* expand_words(const uint64_t* bits, int64_t words, uint16_t* at, uint16_t* lanes) {
  for (int64_t k = 0; k < words; k++, lanes += 64) {
    const uint64_t word = bits[k];
    const int64_t low = __builtin_popcountll(word << 32);
    _mm512_storeu_si512(lanes, _mm512_mask_expand_epi16(fresh(), __mmask32(word), _mm512_loadu_si512(at)));
    _mm512_storeu_si512(lanes + 32, _mm512_mask_expand_epi16(fresh(), __mmask32(word >> 32), _mm512_loadu_si512(at + low)));
    at += __builtin_popcountll(word);
  }
  return at;
}
SPARSEKERN_WORDS inline uint16_t* collect_words(const uint64_t* bits, int64_t words, uint16_t* at, const uint16_t* lanes) {
  for (int64_t k = 0; k < 2 * words; k++, lanes += 32) {
    const __mmask32 mask = __mmask32(bits[k / 2] >> (k % 2 * 32));
    const int64_t count = __builtin_popcount(mask);
    const __mmask32 first = __mmask32((uint64_t(1) << count) - 1);
    _mm512_mask_storeu_epi16(at, first, _mm512_mask_compress_epi16(fresh(), mask, _mm512_loadu_si512(lanes)));
    at += count;
  }
  return at;
}
constexpr bool kLanesByBits = true;
#else
constexpr bool kLanesByBits = false;
inline bool has_words() { return false; }
inline uint16_t* expand_words(const uint64_t*, int64_t, uint16_t* at, uint16_t*) { return at; }
inline uint16_t* collect_words(const uint64_t*, int64_t, uint16_t* at, const uint16_t*) { return at; }
template <bool, class T> SPARSEKERN_INLINE void expand_lanes(uint32_t, const T*, T*) {}
template <class T> SPARSEKERN_INLINE void collect_lanes(uint32_t, const T*, T*) {}
#endif

// Plain numbers of an element's size.
template <class T> struct lane_of { using type = T; };
template <> struct lane_of<bf16> { using type = uint16_t; };
template <> struct lane_of<f16> { using type = uint16_t; };

// Outputs [first, last) of input i by the bitmap, sixteen at a time; returns the first one that is left, less than sixteen
// before O. first is a multiple of 64, and so is last unless it is O.
template <bool to_dense, bool kWhole, class T>
SPARSEKERN_INLINE int64_t lay_out_by_bits(const LinearSupport& w, int64_t i, T* weight, T* row, int64_t first,
                                          int64_t last) {
  using L = typename lane_of<T>::type;
  const uint64_t* bits = w.bits + i * bit_words(w);
  L *at = (L*)(weight + w.ccol[i]) + weights_before(w, i, first / 64), *lanes = (L*)row;
  int64_t o = first;
  if constexpr (sizeof(T) == 2)
    if (kWhole && has_words()) {
      const int64_t words = (last - first) / 64;
      at = to_dense ? expand_words(bits + first / 64, words, at, lanes)
                    : collect_words(bits + first / 64, words, at, lanes);
      o += words * 64, lanes += words * 64;
    }
  for (; o + 64 <= last; o += 64, lanes += 64) {
    const uint64_t word = bits[o / 64];
    const int64_t before[] = {0, __builtin_popcountll(word << 48), __builtin_popcountll(word << 32),
                              __builtin_popcountll(word << 16)};
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      const uint32_t mask = uint32_t(word >> (16 * v)) & 0xffff;
      if (to_dense) expand_lanes<kWhole>(mask, at + before[v], lanes + 16 * v);
      else collect_lanes(mask, lanes + 16 * v, at + before[v]);
    }
    at += __builtin_popcountll(word);
  }
  for (; o + kLanes <= last; o += kLanes, lanes += kLanes) {
    const uint32_t mask = uint32_t(bits[o / 64] >> (o % 64)) & 0xffff;
    if (to_dense) expand_lanes<kWhole>(mask, at, lanes);
    else collect_lanes(mask, lanes, at);
    at += __builtin_popcount(mask);
  }
  return o;
}

// The first block of input i at output o or past it, near the end.
SPARSEKERN_INLINE int64_t block_from(const LinearSupport& w, int64_t i, int64_t o) {
  int64_t b = w.ccol[i + 1];
  while (b > w.ccol[i] && w.rows[b - 1] >= o) b--;
  return b;
}

// Blocks [from, to) to or from a row of outputs [first, last). A width known when compiled is copied by an instruction or two.
template <int64_t kWidth, bool to_dense, class T>
SPARSEKERN_INLINE void lay_out_blocks(const LinearSupport& w, int64_t from, int64_t to, T* weight, T* row, int64_t first,
                                      int64_t last) {
  const int64_t G = kWidth ? kWidth : w.group;
  for (int64_t b = from; b < to; b++) {
    const int64_t o = w.rows[b] * G;
    T* block = weight + b * G;
    if (o >= first && o + G <= last) {
      T* lanes = row + (o - first);
      std::memcpy((void*)(to_dense ? lanes : block), to_dense ? block : lanes, size_t(G) * sizeof(T));
      continue;
    }
    for (int64_t g = 0; g < G; g++) {
      const bool inside = o + g >= first && o + g < last;
      if (to_dense && inside) row[o + g - first] = block[g];
      if (!to_dense && (inside || o + g >= w.outputs)) block[g] = inside ? row[o + g - first] : T{};
    }
  }
}

// Inputs [begin, end) and outputs [first, last) as rows of a dense matrix (end - begin, last - first), or from it.
template <bool to_dense, class T>
void lay_out(const LinearSupport& w, T* weight, T* dense, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t G = w.group, columns = last - first;
  constexpr bool kByBits = kLanesByBits && sizeof(T) < 8;
  const bool by_bits = kByBits && w.bits != nullptr;
  for (int64_t i = begin; i < end; i++) {
    T* row = dense + (i - begin) * columns;
    int64_t done = first;
    if constexpr (kByBits)
      if (by_bits) {
        const bool whole = w.ccol[i + 1] + 2 * kLanes <= w.ccol[w.inputs]; // so many are read at once
        done = whole ? lay_out_by_bits<to_dense, true>(w, i, weight, row, first, last)
                     : lay_out_by_bits<to_dense, false>(w, i, weight, row, first, last);
      }
    if (done == last) continue; // before memset, which takes no null pointer even for no bytes
    if (to_dense) std::memset((void*)(row + (done - first)), 0, size_t(last - done) * sizeof(T));
    const int64_t to = last == w.outputs ? w.ccol[i + 1] : first_block(w, i, (last + G - 1) / G);
    const int64_t from = by_bits ? block_from(w, i, done) : first_block(w, i, first / G);
    if (G == 1) {
      for (int64_t b = from; b < to; b++) {
        if (to_dense) row[w.rows[b] - first] = weight[b];
        else weight[b] = row[w.rows[b] - first];
      }
    } else if (G == 4) lay_out_blocks<4, to_dense>(w, from, to, weight, row, first, last);
    else if (G == 8) lay_out_blocks<8, to_dense>(w, from, to, weight, row, first, last);
    else if (G == 16) lay_out_blocks<16, to_dense>(w, from, to, weight, row, first, last);
    else lay_out_blocks<0, to_dense>(w, from, to, weight, row, first, last);
  }
}

} // namespace
} // namespace sparsekern
