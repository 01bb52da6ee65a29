// The input's gradient where the input is not zero, as dot products: the weights of an input, as a dense row in the
// first-level cache, times the rows of grad_y in which it is active.
#pragma once
#include "sparse_linear_panels.h"

namespace sparsekern {
namespace {

constexpr int64_t kDotStep = 32; // outputs: two registers of float at most, whose sums hide an addition's latency

// out[k] = row . grad_y row entry[k].place, both (length,), a multiple of kDotStep. The order of a sum is the same for any
// kSamples.
template <int kSamples, class A>
SPARSEKERN_INLINE void dots(const A* row, const A* grad_y, int64_t length, const Entry<A>* entry, A* out) {
  reg<A> even[kSamples] = {}, odd[kSamples] = {};
  const A* at[kSamples];
  for (int k = 0; k < kSamples; k++) at[k] = grad_y + entry[k].place * length;
  for (int64_t c = 0; c < length; c += 2 * kRegLanes<A>) {
    const reg<A> w0 = load_reg(row + c), w1 = load_reg(row + c + kRegLanes<A>);
#pragma GCC unroll 4
    for (int k = 0; k < kSamples; k++) {
      even[k] = fma_reg(w0, load_reg(at[k] + c), even[k]);
      odd[k] = fma_reg(w1, load_reg(at[k] + c + kRegLanes<A>), odd[k]);
    }
  }
  for (int k = 0; k < kSamples; k++) out[k] = sum_reg<A>(even[k] + odd[k]);
}

// Inputs [first, last) of grad_y W for rows [begin, end), zero where x is zero. G = 1.
template <class T>
void grad_input_dots(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x, int64_t begin,
                     int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  constexpr int64_t kInputs = 64, kBytes = 1 << 19; // of grad_y: half of a second-level cache
  const int64_t I = w.inputs, O = w.outputs, length = round_up(O, kDotStep);
  const int64_t fitting = kBytes / (length * int64_t(sizeof(A)));
  const int64_t samples = min(end - begin, fitting < 16 ? 16 : min(fitting, kMaxColumns));
  const int64_t words = bit_words(w);
  A* row = (A*)scratch(kValues, size_t(round_up(O, 64)) * sizeof(A));
  const PaddedWeights<T> weights(w, weight, has_bits<T>(w));
  A* gy = (A*)scratch(kSums, size_t(samples * length) * sizeof(A));
  const RowLists<A> lists = allocate_lists<A>(kLists, kInputs, samples);
  for (int64_t s = begin; s < end; s += samples) {
    const int64_t rows = min(samples, end - s);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < length; c += kLanes)
        store(gy + r * length + c, c < O ? load_first(grad_y + (s + r) * O + c, O - c) : vec<A>{});
    for (int64_t i = first; i < last; i += kInputs) {
      const int64_t inputs = min(kInputs, last - i);
      for (int64_t r = 0; r < rows; r++) std::memset((void*)(grad_x + (s + r) * I + i), 0, size_t(inputs) * sizeof(T));
      fill_transposed_lists(x + s * I + i, I, inputs, rows, 1, lists);
      for (int64_t k = 0; k < inputs; k++) {
        if (lists.start[k] == lists.end[k]) continue;
        if (has_bits<T>(w)) {
          const T* p = weights.of_input(i + k);
          for (int64_t c = 0; c < words; c++)
            p = expand_word(w.bits[(i + k) * words + c], p,
                            [&](int v, vec<A> values) { store(row + c * 64 + v * kLanes, values); });
        } else {
          std::memset((void*)row, 0, size_t(length) * sizeof(A));
          const int64_t stop = w.ccol[i + k + 1];
          for (int64_t b = w.ccol[i + k]; b < stop; b++) row[w.rows[b]] = to_acc(weight[b]);
        }
        T* to = grad_x + s * I + i + k;
        A out[4];
        const auto put = [&](const Entry<A>* entry, int count) {
          for (int n = 0; n < count; n++) from_acc(out[n], to[entry[n].place * I]);
        };
        const Entry<A> *p = lists.entries + lists.start[k], *until = lists.entries + lists.end[k];
        for (; p + 4 <= until; p += 4) dots<4>(row, gy, length, p, out), put(p, 4);
        if (p + 2 <= until) dots<2>(row, gy, length, p, out), put(p, 2), p += 2;
        if (p < until) dots<1>(row, gy, length, p, out), put(p, 1);
      }
    }
  }
}

} // namespace
} // namespace sparsekern
