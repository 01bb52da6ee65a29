// The products of groups of outputs (sparse_linear_groups.h) in bfloat16, by instructions that multiply and add pairs: half as
// many. Samples and gradients of bfloat16 are widened, so that of two of them one moves beside the other.
#pragma once
#include "sparse_linear_pairs.h"

namespace sparsekern {
namespace {

constexpr int64_t kGroupSamples = kLinearGroupSamples;

// Outputs times registers of samples whose sums, or gradients, stay in registers.
#if defined(__AVX512F__)
constexpr int kHeld = 16;
#else
constexpr int kHeld = 8;
#endif

template <class T> bool in_pairs() { return std::is_same_v<T, bf16> && has_pairs(); }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// Sixteen lanes of a and b as pairs.
SPARSEKERN_PAIRS_INLINE __m512bh pair_of(const float* a, const float* b) {
  return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(_mm512_load_si512(a), 16), _mm512_load_si512(b));
}

inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xffff : __mmask16((1u << n) - 1); }

// to (ceil(count / 2), kLanes) = two listed blocks of sixteen weights beside each other, the first `outputs` of each; zeros
// beyond.
inline void pair_blocks(const bf16* weight, int64_t step, const int32_t* source, int64_t count, int64_t outputs, uint32_t* to) {
  const __mmask16 mask = first_lanes(outputs);
  for (int64_t e = 0; e < count; e += 2, to += kLanes) {
    const int64_t next = e + 1 < count ? e + 1 : e;
    const __mmask16 other = next > e ? mask : __mmask16(0);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, weight + source[e] * step));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(other, weight + source[next] * step));
    _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// to (count, kLanes) = the listed blocks as they are, with zeros beyond the first `outputs`.
inline void gather_blocks(const bf16* weight, int64_t step, const int32_t* source, int64_t count, int64_t outputs, bf16* to) {
  const __mmask16 mask = first_lanes(outputs);
  for (int64_t e = 0; e < count; e++)
    _mm256_store_si256((__m256i*)(to + e * kLanes), _mm256_maskz_loadu_epi16(mask, weight + source[e] * step));
}

// As add_group(), of pairs of blocks; x (inputs and one of zeros, kGroupSamples).
template <int kRegs>
SPARSEKERN_PAIRS void add_group_pairs(const float* x, int64_t zeros, const uint32_t* weight, const int32_t* input,
                                      int64_t count, float* sums) {
  constexpr int kOutputs = kHeld / kRegs;
  __m512 sum[kOutputs][kRegs];
#pragma GCC unroll 16
  for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) sum[o][r] = _mm512_load_ps(sums + o * kGroupSamples + r * kLanes);
  for (int64_t e = 0; e < count; e += 2, weight += kLanes) {
    const float *a = x + input[e] * kGroupSamples, *b = x + (e + 1 < count ? input[e + 1] : zeros) * kGroupSamples;
    __m512bh v[kRegs];
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) v[r] = pair_of(a + r * kLanes, b + r * kLanes);
#pragma GCC unroll 16
    for (int o = 0; o < kOutputs; o++) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32(int32_t(weight[o]));
#pragma GCC unroll 2
      for (int r = 0; r < kRegs; r++) sum[o][r] = _mm512_dpbf16_ps(sum[o][r], w, v[r]);
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) _mm512_store_ps(sums + o * kGroupSamples + r * kLanes, sum[o][r]);
}

// As add_gradients(), of all sixteen outputs at once.
template <int kRegs>
SPARSEKERN_PAIRS void add_gradient_pairs(const float* grad, const bf16* weight, const int32_t* input, int64_t count,
                                         float* to) {
  constexpr int kOutputs = kLanes / 2; // pairs of them
  __m512bh held[kOutputs][kRegs];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) {
      const float* at = grad + 2 * o * kGroupSamples + r * kLanes;
      held[o][r] = pair_of(at, at + kGroupSamples);
    }
  for (int64_t e = 0; e < count; e++, weight += kLanes) {
    float* at = to + input[e] * kGroupSamples;
    __m512 sum[kRegs];
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) sum[r] = _mm512_load_ps(at + r * kLanes);
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; o++) {
      int32_t pair;
      std::memcpy(&pair, weight + 2 * o, sizeof pair);
#pragma GCC unroll 2
      for (int r = 0; r < kRegs; r++) sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), held[o][r]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) _mm512_store_ps(at + r * kLanes, sum[r]);
  }
}

// As add_products(), of pairs of samples: samples (inputs, kGroupSamples) of bfloat16, grad (ceil(rows / 2), kLanes) pairs.
template <int kBlocks>
SPARSEKERN_PAIRS void add_product_pairs(const bf16* samples, int64_t step, const int32_t* input, const uint32_t* grad,
                                        int64_t rows, float* sums) {
  __m512 sum[kBlocks];
#pragma GCC unroll 16
  for (int e = 0; e < kBlocks; e++) sum[e] = _mm512_load_ps(sums + e * kLanes);
  for (int64_t s = 0; s < rows; s += kGroupSamples, samples += step) {
    const bf16* x[kBlocks];
#pragma GCC unroll 16
    for (int e = 0; e < kBlocks; e++) x[e] = samples + input[e] * kGroupSamples;
    const int64_t pairs = (min(kGroupSamples, rows - s) + 1) / 2;
    for (int64_t p = 0; p < pairs; p++, grad += kLanes) {
      const __m512bh g = (__m512bh)_mm512_load_si512(grad);
#pragma GCC unroll 16
      for (int e = 0; e < kBlocks; e++) {
        int32_t pair;
        std::memcpy(&pair, x[e] + 2 * p, sizeof pair);
        sum[e] = _mm512_dpbf16_ps(sum[e], (__m512bh)_mm512_set1_epi32(pair), g);
      }
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < kBlocks; e++) _mm512_store_ps(sums + e * kLanes, sum[e]);
}

// To bfloat16, which they are: samples (., kGroupSamples) of sixteen inputs.
inline void narrow_samples(const float* from, int64_t inputs, bf16* to) {
  for (int64_t k = 0; k < inputs * kGroupSamples; k += kLanes)
    _mm256_store_si256((__m256i*)(to + k), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_load_si512(from + k), 16)));
}
#else
inline void pair_blocks(const bf16*, int64_t, const int32_t*, int64_t, int64_t, uint32_t*) {}
inline void gather_blocks(const bf16*, int64_t, const int32_t*, int64_t, int64_t, bf16*) {}
template <int> void add_group_pairs(const float*, int64_t, const uint32_t*, const int32_t*, int64_t, float*) {}
template <int> void add_gradient_pairs(const float*, const bf16*, const int32_t*, int64_t, float*) {}
template <int> void add_product_pairs(const bf16*, int64_t, const int32_t*, const uint32_t*, int64_t, float*) {}
inline void store_pairs(uint32_t*, const bf16*, int64_t, int64_t, int64_t, int64_t) {}
inline void narrow_samples(const float*, int64_t, bf16*) {}
#endif

} // namespace
} // namespace sparsekern
