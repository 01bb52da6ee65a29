// The kernels for groups of 16, 32, ... outputs: every block is a few whole vectors, which are added to sums in the
// first-level cache.
#pragma once
#include "sparse_linear.h"
#include "sparse_linear_rows.h"

namespace sparsekern {
namespace {

constexpr int64_t kAhead = 4; // inputs by which grad_input fetches weights in advance; forward gained nothing from it

// The number of blocks that every input has, or one more; 0 where they differ by more.
inline int64_t even_count(const LinearSupport& w) {
  const int32_t count = w.inputs == 0 ? 0 : int32_t(w.ccol[w.inputs] / w.inputs);
  int32_t uneven = 0;
  for (int64_t i = 0; i < w.inputs; i++) uneven |= uint32_t(w.ccol[i + 1] - w.ccol[i] - count) > 1;
  return uneven ? 0 : count;
}

template <class T> SPARSEKERN_INLINE void fetch(const T* p, int64_t n) {
  for (int64_t e = 0; e < n; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + e);
}

// sums += the blocks of the active inputs, weighted. kGroup is G, or 0 for any.
template <int64_t kGroup, class T>
SPARSEKERN_INLINE void add_blocks(const LinearSupport& w, const T* weight, const acc_t<T>* value, const int32_t* index,
                                  int64_t active, acc_t<T>* sums) {
  const int64_t G = kGroup ? kGroup : w.group;
  const int32_t *ccol = w.ccol, *rows = w.rows;
  for (int64_t p = 0; p < active; p++) {
    const vec<acc_t<T>> a = splat(value[p]);
    const int64_t end = ccol[index[p] + 1];
    for (int64_t b = ccol[index[p]]; b < end; b++)
      for (int64_t g = 0; g < G; g += kLanes) {
        acc_t<T>* out = sums + int64_t(rows[b]) * G + g;
        store(out, fma(a, load(weight + b * G + g), load(out)));
      }
  }
}

// The same for blocks of sixteen where every input has `count` blocks or one more, as drawn supports do: the loop has
// one length, so that its end is foreseen, and the block more is added to `spare` where there is none.
template <class T>
SPARSEKERN_INLINE void add_even_blocks(const LinearSupport& w, const T* weight, int64_t count, const acc_t<T>* value,
                                       const int32_t* index, int64_t active, acc_t<T>* sums, int64_t spare) {
  const int32_t *ccol = w.ccol, *rows = w.rows;
  for (int64_t p = 0; p < active; p++) {
    const vec<acc_t<T>> a = splat(value[p]);
    const int64_t first = ccol[index[p]];
    const bool more = ccol[index[p] + 1] - first > count;
    const T* block = weight + first * kLanes;
    const int32_t* row = rows + first;
    int64_t b = 0;
    for (; b + 4 <= count; b += 4)
#pragma GCC unroll 4
      for (int64_t u = b; u < b + 4; u++) {
        acc_t<T>* out = sums + uint32_t(row[u]) * uint64_t(kLanes);
        store(out, fma(a, load(block + u * kLanes), load(out)));
      }
    for (; b < count; b++) {
      acc_t<T>* out = sums + uint32_t(row[b]) * uint64_t(kLanes);
      store(out, fma(a, load(block + b * kLanes), load(out)));
    }
    const int64_t last = more ? count : count - 1;
    acc_t<T>* out = sums + (more ? int64_t(row[last]) * kLanes : spare);
    store(out, fma(a, load(block + last * kLanes), load(out)));
  }
}

// Rows [begin, end) of y. To split the outputs, so that a part's weights stay in the second-level cache, was slower: the
// loops over an input's blocks become short and of changing length.
template <class T>
void forward_blocks(const LinearSupport& w, const T* x, const T* weight, const T* bias, T* y, int64_t begin,
                    int64_t end) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, room = (O + G - 1) / G * G;
  A* value = (A*)scratch(kValues, size_t(I + kLanes) * sizeof(A));
  int32_t* index = (int32_t*)scratch(kIndices, size_t(I + kLanes) * 4);
  A* sums = (A*)scratch(kSums, size_t(room + kLanes) * sizeof(A));
  store(sums + room, vec<A>{});
  const int64_t even = G == kLanes ? even_count(w) : 0;
  for (int64_t s = begin; s < end; s++) {
    const int64_t active = compress(x + s * I, I, value, index);
    for (int64_t c = 0; c < room; c += kLanes)
      store(sums + c, bias && c < O ? load_first(bias + c, O - c) : vec<A>{});
    if (even > 0) add_even_blocks(w, weight, even, value, index, active, sums, room);
    else if (G == kLanes) add_blocks<kLanes>(w, weight, value, index, active, sums);
    else add_blocks<0>(w, weight, value, index, active, sums);
    for (int64_t c = 0; c < O; c += kLanes) store_first(y + s * O + c, load(sums + c), O - c);
  }
}

// The sum over the blocks of input i of block times grad_y (groups * G,) at its outputs.
template <int64_t kGroup, class T>
SPARSEKERN_INLINE acc_t<T> dot_blocks(const LinearSupport& w, const T* weight, int64_t i, const acc_t<T>* grad_y) {
  using A = acc_t<T>;
  const int64_t G = kGroup ? kGroup : w.group, end = w.ccol[i + 1];
  vec<A> lanes[4] = {};
  int64_t b = w.ccol[i];
  if (kGroup == kLanes)
    for (; b + 4 <= end; b += 4)
      for (int v = 0; v < 4; v++)
        lanes[v] = fma(load(weight + (b + v) * G), load(grad_y + int64_t(w.rows[b + v]) * G), lanes[v]);
  for (; b < end; b++)
    for (int64_t g = 0; g < G; g += kLanes)
      lanes[0] = fma(load(weight + b * G + g), load(grad_y + int64_t(w.rows[b]) * G + g), lanes[0]);
  return sum<A>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}

// Rows [begin, end) of grad_x, zero where x is zero if at_nonzeros.
template <class T>
void grad_input_blocks(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x,
                       bool at_nonzeros, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, room = (O + G - 1) / G * G;
  A* gy = (A*)scratch(kSums, size_t(room) * sizeof(A));
  A* value = (A*)scratch(kValues, size_t(I + kLanes) * sizeof(A));
  int32_t* index = (int32_t*)scratch(kIndices, size_t(I + kLanes) * 4);
  for (int64_t i = 0; !at_nonzeros && i < I; i++) index[i] = int32_t(i);
  for (int64_t s = begin; s < end; s++) {
    for (int64_t c = 0; c < room; c += kLanes)
      store(gy + c, c < O ? load_first(grad_y + s * O + c, O - c) : vec<A>{});
    T* out = grad_x + s * I;
    if (at_nonzeros) std::memset((void*)out, 0, size_t(I) * sizeof(T));
    const int64_t wanted = at_nonzeros ? compress(x + s * I, I, value, index) : I;
    for (int64_t p = 0; p < wanted; p++) {
      const int64_t i = index[p];
      if (p + kAhead < wanted) {
        const int64_t b = w.ccol[index[p + kAhead]], until = w.ccol[index[p + kAhead] + 1];
        fetch(weight + b * G, (until - b) * G);
        fetch(w.rows + b, until - b);
      }
      from_acc(G == 16 ? dot_blocks<16>(w, weight, i, gy) : dot_blocks<0>(w, weight, i, gy), out[i]);
    }
  }
}

// sums (kVectors * 16,) += the listed rows of grad_y at the given outputs, weighted.
template <int kVectors, class T>
SPARSEKERN_INLINE void add_samples(const T* grad_y, int64_t O, const int64_t* outputs, const acc_t<T>* value,
                                   const int32_t* sample, int32_t count, acc_t<T>* sums) {
  vec<acc_t<T>> sum[kVectors];
  for (int v = 0; v < kVectors; v++) sum[v] = load(sums + v * kLanes);
  for (int32_t p = 0; p < count; p++) {
    const T* row = grad_y + sample[p] * O;
    const vec<acc_t<T>> a = splat(value[p]);
    for (int v = 0; v < kVectors; v++)
      if (outputs[v] < O) sum[v] = fma(a, load_first(row + outputs[v], O - outputs[v]), sum[v]);
  }
  for (int v = 0; v < kVectors; v++) store(sums + v * kLanes, sum[v]);
}

// The blocks of inputs [begin, end) of grad_y^T x, summed over B rows in ascending order.
template <class T>
void grad_weight_blocks(const LinearSupport& w, const T* grad_y, const T* x, T* grad, int64_t B, int64_t begin,
                        int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kInputs = 64, kSamplesAtOnce = 128;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, vectors = G / kLanes;
  const RowLists<A> lists = allocate_lists<A>(kLists, kInputs, kSamplesAtOnce);
  for (int64_t i = begin; i < end; i += kInputs) {
    const int64_t inputs = end - i < kInputs ? end - i : kInputs;
    const int64_t first = w.ccol[i], count = (w.ccol[i + inputs] - first) * vectors; // vectors of sixteen sums
    A* sums = (A*)scratch(kSums, size_t(count * kLanes) * sizeof(A));
    std::memset((void*)sums, 0, size_t(count * kLanes) * sizeof(A));
    for (int64_t s = 0; s < B; s += kSamplesAtOnce) {
      const int64_t samples = B - s < kSamplesAtOnce ? B - s : kSamplesAtOnce;
      fill_transposed_lists(x + s * I + i, I, inputs, samples, 1, lists);
      for (int64_t k = 0; k < inputs; k++) {
        const int32_t p = lists.start[k], n = lists.end[k] - p;
        if (n == 0) continue;
        const int64_t last = (w.ccol[i + k + 1] - first) * vectors;
        const auto output = [&](int64_t v) {
          return int64_t(w.rows[first + v / vectors]) * G + v % vectors * kLanes;
        };
        int64_t v = (w.ccol[i + k] - first) * vectors;
        for (; v + 4 <= last; v += 4) {
          const int64_t o[4] = {output(v), output(v + 1), output(v + 2), output(v + 3)};
          add_samples<4>(grad_y + s * O, O, o, lists.value + p, lists.offset + p, n, sums + v * kLanes);
        }
        for (; v < last; v++) {
          const int64_t o = output(v);
          add_samples<1>(grad_y + s * O, O, &o, lists.value + p, lists.offset + p, n, sums + v * kLanes);
        }
      }
    }
    for (int64_t v = 0; v < count; v++) store(grad + first * G + v * kLanes, load(sums + v * kLanes));
  }
}

} // namespace
} // namespace sparsekern
