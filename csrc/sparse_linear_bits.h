// Weights of single outputs (G = 1) by a bitmap of their support: sixteen stored weights are spread over their outputs, or
// collected from them, by one instruction where there is one.
#pragma once
#include "sparse_linear.h"
#include "sparse_linear_rows.h"

namespace sparsekern {
namespace {

#if defined(__AVX512F__)
constexpr bool kHasExpand = true;

// The elements of v in order, at the lanes of the mask's lowest 16 bits; zeros elsewhere.
SPARSEKERN_INLINE vec<float> expand(uint64_t mask, vec<float> v) {
  return (vec<float>)_mm512_mask_expand_ps((__m512)fresh(), __mmask16(mask), (__m512)v);
}
SPARSEKERN_INLINE vec<float> pack(uint32_t mask, vec<float> v) {
  return (vec<float>)_mm512_mask_compress_ps((__m512)fresh(), __mmask16(mask), (__m512)v);
}
#else
constexpr bool kHasExpand = false;
#endif
// Where has_bits() is false.
template <class V> SPARSEKERN_INLINE V expand(uint64_t, V v) { return v; }
template <class V> SPARSEKERN_INLINE V pack(uint32_t, V v) { return v; }

// Whether the bitmap serves here. Spreading eight weights of float64 takes three times as long as adding them one by one.
template <class T> SPARSEKERN_INLINE bool has_bits(const LinearSupport& w) {
  return kHasExpand && sizeof(T) < 8 && w.bits != nullptr;
}

SPARSEKERN_INLINE int64_t bit_words(const LinearSupport& w) { return (w.outputs + 63) / 64; }

// The stored weights such that `lanes` can be read from any of an input's on: the last ones are copied.
template <class T> struct PaddedWeights {
  const T* weight;
  const T* copy;
  const int32_t* ccol;
  int64_t tail; // the first input of the copy

  PaddedWeights(const LinearSupport& w, const T* weight_, bool wanted = true, int64_t lanes = kLanes)
      : weight(weight_), copy(nullptr), ccol(w.ccol), tail(w.inputs) {
    if (!wanted) return;
    const int64_t n = w.ccol[w.inputs];
    while (tail > 0 && w.ccol[tail] + lanes > n) tail--;
    T* memory = (T*)scratch(kTail, size_t(n - w.ccol[tail] + lanes) * sizeof(T));
    std::memset((void*)memory, 0, size_t(n - w.ccol[tail] + lanes) * sizeof(T));
    if (n > w.ccol[tail]) // no weights may have no memory
      std::memcpy((void*)memory, weight + w.ccol[tail], size_t(n - w.ccol[tail]) * sizeof(T));
    copy = memory;
  }
  SPARSEKERN_INLINE const T* of_input(int64_t i) const {
    return i >= tail ? copy + (ccol[i] - ccol[tail]) : weight + ccol[i];
  }
};

// Sixty-four outputs of an input whose existing weights are at p: calls use(v, sixteen weights) for v = 0 .. 3. Returns
// where the next ones are.
template <class T, class Use> SPARSEKERN_INLINE const T* expand_word(uint64_t word, const T* p, Use use) {
  const int64_t c1 = __builtin_popcountll(word << 48), c2 = __builtin_popcountll(word << 32);
  const int64_t c3 = __builtin_popcountll(word << 16);
#if defined(__AVX512BW__)
  // One move of a mask from a general register in place of four: a tenth of a single row's time.
  const __mmask64 mask = _cvtu64_mask64(word), mask1 = _kshiftri_mask64(mask, 16);
  const __mmask64 mask2 = _kshiftri_mask64(mask, 32), mask3 = _kshiftri_mask64(mask, 48);
#else
  const uint64_t mask = word, mask1 = word >> 16, mask2 = word >> 32, mask3 = word >> 48;
#endif
  use(0, expand(mask, load(p)));
  use(1, expand(mask1, load(p + c1)));
  use(2, expand(mask2, load(p + c2)));
  use(3, expand(mask3, load(p + c3)));
  return p + __builtin_popcountll(word);
}

// Existing weights before a word of input i.
SPARSEKERN_INLINE int64_t weights_before(const LinearSupport& w, int64_t i, int64_t word) {
  int64_t n = 0;
  for (int64_t k = 0; k < word; k++) n += __builtin_popcountll(w.bits[i * bit_words(w) + k]);
  return n;
}

// sums (ceil(O / 64) * 64,) += value times the weights, of N inputs: the sums are read and written once for all of them.
template <int N, class T>
SPARSEKERN_INLINE void add_inputs(const LinearSupport& w, const PaddedWeights<T>& weights, const acc_t<T>* value,
                                  const int32_t* index, acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t words = bit_words(w);
  const uint64_t* bits[N];
  const T* at[N];
  vec<A> a[N];
  for (int n = 0; n < N; n++) {
    bits[n] = w.bits + index[n] * words;
    at[n] = weights.of_input(index[n]);
    a[n] = splat(value[n]);
  }
  for (int64_t k = 0; k < words; k++, sums += 64) {
    vec<A> sum[4];
    for (int v = 0; v < 4; v++) sum[v] = load(sums + v * kLanes);
    for (int n = 0; n < N; n++)
      at[n] = expand_word(bits[n][k], at[n], [&](int v, vec<A> x) { sum[v] = fma(a[n], x, sum[v]); });
    for (int v = 0; v < 4; v++) store(sums + v * kLanes, sum[v]);
  }
}

// One row of y = x W^T from its non-zeros, added to sums. An input's weights are read in one go: sums of 64 outputs in
// registers over all inputs took twice as long, as each step went to another page.
template <class T>
void forward_bits(const LinearSupport& w, const PaddedWeights<T>& weights, int64_t active, const acc_t<T>* value,
                  const int32_t* index, acc_t<T>* sums) {
  int64_t p = 0;
  for (; p + 4 <= active; p += 4) add_inputs<4>(w, weights, value + p, index + p, sums);
  for (; p < active; p++) add_inputs<1>(w, weights, value + p, index + p, sums);
}

// For each of N inputs the sum over its weights of weight times grad_y (ceil(O / 64) * 64,) at its outputs: to grad_x at the
// input. The order of a sum is the same for any N.
template <int N, class T>
SPARSEKERN_INLINE void dot_inputs(const LinearSupport& w, const PaddedWeights<T>& weights, const int32_t* index,
                                  const acc_t<T>* grad_y, T* grad_x) {
  using A = acc_t<T>;
  const int64_t words = bit_words(w);
  const uint64_t* bits[N];
  const T* at[N];
  vec<A> even[N] = {}, odd[N] = {};
  for (int n = 0; n < N; n++) {
    bits[n] = w.bits + index[n] * words;
    at[n] = weights.of_input(index[n]);
  }
  for (int64_t k = 0; k < words; k++, grad_y += 64) {
    vec<A> gy[4];
    for (int v = 0; v < 4; v++) gy[v] = load(grad_y + v * kLanes);
    for (int n = 0; n < N; n++)
      at[n] = expand_word(bits[n][k], at[n], [&](int v, vec<A> x) {
        vec<A>& total = v % 2 ? odd[n] : even[n];
        total = fma(x, gy[v], total);
      });
  }
  for (int n = 0; n < N; n++) from_acc(sum<A>(even[n] + odd[n]), grad_x[index[n]]);
}

// The sums of an input at its existing outputs, narrowed, to its place in a gradient of the stored weights. Whole vectors
// are written, also over what belongs to the next inputs, but nothing from `last` on.
template <class T>
SPARSEKERN_INLINE void pack_input(const LinearSupport& w, int64_t i, const acc_t<T>* sums, T* grad, int64_t last) {
  const int64_t words = bit_words(w);
  int64_t to = w.ccol[i];
  for (int64_t k = 0; k < words; k++) {
    const uint64_t word = w.bits[i * words + k];
    for (int v = 0; v < 4; v++) {
      const uint32_t mask = uint32_t(word >> (16 * v) & 0xffff);
      const int64_t count = __builtin_popcount(mask);
      if (count == 0) continue;
      store_first(grad + to, pack(mask, load(sums + k * 64 + v * kLanes)), last - to < kLanes ? count : kLanes);
      to += count;
    }
  }
}

} // namespace
} // namespace sparsekern
