// The weights laid out as a dense (I, O) matrix, and collected from one.
#pragma once
#include "sparse_linear_bits.h"

namespace sparsekern {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// The elements at p in order, at the lanes of the mask; zeros elsewhere. Reads and writes only as many as the mask has.
SPARSEKERN_INLINE void expand_lanes(uint32_t mask, const float* p, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_expandloadu_ps(__mmask16(mask), p));
}
SPARSEKERN_INLINE void expand_lanes(uint32_t mask, const uint16_t* p, uint16_t* out) {
  const __m256i v = _mm256_maskz_loadu_epi16(__mmask16((1u << __builtin_popcount(mask)) - 1), p);
  const __m512i spread = _mm512_maskz_expand_epi32(__mmask16(mask), _mm512_cvtepu16_epi32(v));
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(spread));
}
SPARSEKERN_INLINE void collect_lanes(uint32_t mask, const float* p, float* out) {
  const __mmask16 first = __mmask16((1u << __builtin_popcount(mask)) - 1);
  _mm512_mask_storeu_ps(out, first, _mm512_maskz_compress_ps(__mmask16(mask), _mm512_loadu_ps(p)));
}
SPARSEKERN_INLINE void collect_lanes(uint32_t mask, const uint16_t* p, uint16_t* out) {
  const __mmask16 first = __mmask16((1u << __builtin_popcount(mask)) - 1);
  const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  _mm256_mask_storeu_epi16(out, first, _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(__mmask16(mask), v)));
}
constexpr bool kLanesByBits = true;
#else
constexpr bool kLanesByBits = false;
template <class T> SPARSEKERN_INLINE void expand_lanes(uint32_t, const T*, T*) {}
template <class T> SPARSEKERN_INLINE void collect_lanes(uint32_t, const T*, T*) {}
#endif

// Plain numbers of an element's size.
template <class T> struct lane_of { using type = T; };
template <> struct lane_of<bf16> { using type = uint16_t; };
template <> struct lane_of<f16> { using type = uint16_t; };

// Sixteen outputs at a time by the bitmap; returns how many outputs of input i were done.
template <bool to_dense, class T>
SPARSEKERN_INLINE int64_t lay_out_by_bits(const LinearSupport& w, int64_t i, T* weight, T* row) {
  using L = typename lane_of<T>::type;
  const uint64_t* bits = w.bits + i * bit_words(w);
  L *at = (L*)(weight + w.ccol[i]), *lanes = (L*)row;
  int64_t o = 0;
  for (; o + kLanes <= w.outputs; o += kLanes) {
    const uint32_t mask = uint32_t(bits[o / 64] >> (o % 64)) & 0xffff;
    if (to_dense) expand_lanes(mask, (const L*)at, lanes + o);
    else collect_lanes(mask, (const L*)(lanes + o), at);
    at += __builtin_popcount(mask);
  }
  return o;
}

// The first block of input i at output o or past it.
SPARSEKERN_INLINE int64_t block_from(const LinearSupport& w, int64_t i, int64_t o) {
  int64_t b = w.ccol[i + 1];
  while (b > w.ccol[i] && w.rows[b - 1] >= o) b--;
  return b;
}

// Blocks of a width known when compiled are copied by an instruction or two.
template <int64_t kWidth, bool to_dense, class T>
SPARSEKERN_INLINE void lay_out_blocks(const LinearSupport& w, int64_t i, T* weight, T* row) {
  const int64_t G = kWidth ? kWidth : w.group;
  for (int64_t b = w.ccol[i]; b < w.ccol[i + 1]; b++) {
    const int64_t o = w.rows[b] * G;
    T* block = weight + b * G;
    if (o + G <= w.outputs) {
      std::memcpy((void*)(to_dense ? row + o : block), to_dense ? block : row + o, size_t(G) * sizeof(T));
      continue;
    }
    const int64_t lanes = w.outputs - o;
    std::memcpy((void*)(to_dense ? row + o : block), to_dense ? block : row + o, size_t(lanes) * sizeof(T));
    if (!to_dense) std::memset((void*)(block + lanes), 0, size_t(G - lanes) * sizeof(T));
  }
}

template <bool to_dense, class T>
void lay_out(const LinearSupport& w, T* weight, T* dense, int64_t begin, int64_t end) {
  const int64_t O = w.outputs, G = w.group;
  constexpr bool kByBits = kLanesByBits && sizeof(T) < 8;
  const bool by_bits = kByBits && w.bits != nullptr;
  for (int64_t i = begin; i < end; i++) {
    T* row = dense + i * O;
    int64_t done = 0;
    if constexpr (kByBits)
      if (by_bits) done = lay_out_by_bits<to_dense>(w, i, weight, row);
    if (to_dense) std::memset((void*)(row + done), 0, size_t(O - done) * sizeof(T));
    if (G == 1) {
      for (int64_t b = by_bits ? block_from(w, i, done) : w.ccol[i]; b < w.ccol[i + 1]; b++) {
        if (to_dense) row[w.rows[b]] = weight[b];
        else weight[b] = row[w.rows[b]];
      }
    } else if (G == 4) lay_out_blocks<4, to_dense>(w, i, weight, row);
    else if (G == 8) lay_out_blocks<8, to_dense>(w, i, weight, row);
    else if (G == 16) lay_out_blocks<16, to_dense>(w, i, weight, row);
    else lay_out_blocks<0, to_dense>(w, i, weight, row);
  }
}

} // namespace
} // namespace sparsekern
