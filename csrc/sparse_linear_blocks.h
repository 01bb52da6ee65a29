// The kernels for groups of 16, 32, ... outputs: every block is a few whole vectors, which are added to sums in the
// first-level cache.
#pragma once
#include "reg.h"
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

// out (16,) += a * block.
template <class T> SPARSEKERN_INLINE void add_block(reg<acc_t<T>> a, const T* block, acc_t<T>* out) {
#pragma GCC unroll 8
  for (int r = 0; r < kLanes; r += kRegLanes<acc_t<T>>)
    store_reg(out + r, fma_reg(a, load_reg(block + r), load_reg(out + r)));
}

// sums += the blocks of the active inputs, weighted. kGroup is G, or 0 for any.
template <int64_t kGroup, class T>
SPARSEKERN_INLINE void add_blocks(const LinearSupport& w, const T* weight, const acc_t<T>* value, const int32_t* index,
                                  int64_t active, acc_t<T>* sums) {
  const int64_t G = kGroup ? kGroup : w.group;
  const int32_t *ccol = w.ccol, *rows = w.rows;
  for (int64_t p = 0; p < active; p++) {
    const reg<acc_t<T>> a = value[p] - reg<acc_t<T>>{};
    const int64_t end = ccol[index[p] + 1];
    for (int64_t b = ccol[index[p]]; b < end; b++)
      for (int64_t g = 0; g < G; g += kLanes) add_block(a, weight + b * G + g, sums + int64_t(rows[b]) * G + g);
  }
}

// The same for blocks of sixteen where every input has `count` blocks or one more, as drawn supports do: the loop has
// one length, so that its end is foreseen, and the block more is added to `spare` where there is none.
template <class T>
SPARSEKERN_INLINE void add_even_blocks(const LinearSupport& w, const T* weight, int64_t count, const acc_t<T>* value,
                                       const int32_t* index, int64_t active, acc_t<T>* sums, int64_t spare) {
  const int32_t *ccol = w.ccol, *rows = w.rows;
  for (int64_t p = 0; p < active; p++) {
    const reg<acc_t<T>> a = value[p] - reg<acc_t<T>>{};
    const int64_t first = ccol[index[p]];
    const bool more = ccol[index[p] + 1] - first > count;
    const T* block = weight + first * kLanes;
    const int32_t* row = rows + first;
    int64_t b = 0;
    for (; b + 4 <= count; b += 4)
#pragma GCC unroll 4
      for (int64_t u = b; u < b + 4; u++) add_block(a, block + u * kLanes, sums + uint32_t(row[u]) * uint64_t(kLanes));
    for (; b < count; b++) add_block(a, block + b * kLanes, sums + uint32_t(row[b]) * uint64_t(kLanes));
    const int64_t last = more ? count : count - 1;
    add_block(a, block + last * kLanes, sums + (more ? int64_t(row[last]) * kLanes : spare));
  }
}

// How many neighbouring inputs have weights that stay in the second-level cache while the rows of a tile walk over them.
// Sums are taken in the order of the inputs, whatever the parts are.
template <class T> int64_t inputs_at_once(const LinearSupport& w, int64_t rows) {
  constexpr int64_t kBytes = 1 << 19;
  const int64_t bytes = int64_t(w.ccol[w.inputs]) * w.group * int64_t(sizeof(T));
  return rows == 1 || bytes <= kBytes ? w.inputs : w.inputs * kBytes / bytes + 1;
}

constexpr int64_t kTileOfRows = 32; // their sums share that cache

// Rows [begin, end) of y. To split the outputs, so that a part's weights stay in the second-level cache, was slower:
// the loops over an input's blocks become short and of changing length.
template <class T>
void forward_blocks(const LinearSupport& w, const T* x, const T* weight, const T* bias, T* y, int64_t begin,
                    int64_t end) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, room = (O + G - 1) / G * G, stride = room + kLanes;
  const int64_t tile = min(end - begin, kTileOfRows), part = inputs_at_once<T>(w, tile);
  A* value = (A*)scratch(kValues, size_t(part + kLanes) * sizeof(A));
  int32_t* index = (int32_t*)scratch(kIndices, size_t(part + kLanes) * 4);
  A* sums = (A*)scratch(kSums, size_t(tile * stride) * sizeof(A));
  const int64_t even = G == kLanes ? even_count(w) : 0;
  // 1600 -> 1500, density 0.1, 1,024 rows of which an eighth is active: 3.05 ms, without 3.45; 64 rows 1 % more.
  const bool far = (end - begin) * I * int64_t(sizeof(T)) > 1 << 20;
  for (int64_t s = begin; s < end; s += tile) {
    const int64_t rows = min(end - s, tile);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < stride; c += kLanes)
        store(sums + r * stride + c, bias && c < O ? load_first(bias + c, O - c) : vec<A>{});
    for (int64_t i = 0; i < I; i += part) {
      LinearSupport inputs = w;
      inputs.ccol += i;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t active = compress(x + (s + r) * I + i, min(I - i, part), value, index);
        A* sum = sums + r * stride;
        if (far && r + 1 < rows) fetch(x + (s + r + 1) * I + i, min(I - i, part));
        if (even > 0) add_even_blocks(inputs, weight, even, value, index, active, sum, room);
        else if (G == kLanes) add_blocks<kLanes>(inputs, weight, value, index, active, sum);
        else add_blocks<0>(inputs, weight, value, index, active, sum);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < O; c += kLanes) store_first(y + (s + r) * O + c, load(sums + r * stride + c), O - c);
  }
}

// The sum over the blocks of input i of block times grad_y (groups * G,) at its outputs.
template <int64_t kGroup, class T>
SPARSEKERN_INLINE acc_t<T> dot_blocks(const LinearSupport& w, const T* weight, int64_t i, const acc_t<T>* grad_y) {
  using A = acc_t<T>;
  const int64_t G = kGroup ? kGroup : w.group, end = w.ccol[i + 1];
  constexpr int kRegs = kLanes / kRegLanes<A>; // of a block
  constexpr int kSums = kRegs < 4 ? 4 : kRegs; // as many as hide an addition's latency
  reg<A> lanes[kSums] = {};
  int64_t b = w.ccol[i];
  if (kGroup == kLanes)
    for (; b + kSums / kRegs <= end; b += kSums / kRegs)
#pragma GCC unroll 8
      for (int r = 0; r < kSums; r++) {
        const int64_t v = b + r / kRegs, at = r % kRegs * kRegLanes<A>;
        lanes[r] = fma_reg(load_reg(weight + v * G + at), load_reg(grad_y + int64_t(w.rows[v]) * G + at), lanes[r]);
      }
  for (; b < end; b++)
    for (int64_t g = 0; g < G; g += kLanes)
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; r++) {
        const int64_t at = g + r * kRegLanes<A>;
        lanes[r] = fma_reg(load_reg(weight + b * G + at), load_reg(grad_y + int64_t(w.rows[b]) * G + at), lanes[r]);
      }
#pragma GCC unroll 3
  for (int n = kSums / 2; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int r = 0; r < n; r++) lanes[r] += lanes[r + n];
  return sum_reg<A>(lanes[0]);
}

// Rows [begin, end) of grad_x, zero where x is zero if at_nonzeros.
template <class T>
void grad_input_blocks(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x,
                       bool at_nonzeros, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, room = (O + G - 1) / G * G;
  const int64_t tile = min(end - begin, kTileOfRows), part = inputs_at_once<T>(w, tile);
  A* gy = (A*)scratch(kSums, size_t(tile * room) * sizeof(A));
  A* value = (A*)scratch(kValues, size_t(part + kLanes) * sizeof(A));
  int32_t* index = (int32_t*)scratch(kIndices, size_t(part + kLanes) * 4);
  for (int64_t i = 0; !at_nonzeros && i < part; i++) index[i] = int32_t(i);
  for (int64_t s = begin; s < end; s += tile) {
    const int64_t rows = min(end - s, tile);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < room; c += kLanes)
        store(gy + r * room + c, c < O ? load_first(grad_y + (s + r) * O + c, O - c) : vec<A>{});
    for (int64_t i = 0; i < I; i += part) {
      const int64_t inputs = min(I - i, part);
      const int32_t* ccol = w.ccol + i;
      for (int64_t r = 0; r < rows; r++) {
        T* out = grad_x + (s + r) * I + i;
        if (at_nonzeros) std::memset((void*)out, 0, size_t(inputs) * sizeof(T));
        const int64_t wanted = at_nonzeros ? compress(x + (s + r) * I + i, inputs, value, index) : inputs;
        for (int64_t p = 0; p < wanted; p++) {
          if (p + kAhead < wanted) {
            const int64_t b = ccol[index[p + kAhead]], until = ccol[index[p + kAhead] + 1];
            fetch(weight + b * G, (until - b) * G);
            fetch(w.rows + b, until - b);
          }
          const int64_t input = i + index[p];
          from_acc(G == 16 ? dot_blocks<16>(w, weight, input, gy + r * room)
                           : dot_blocks<0>(w, weight, input, gy + r * room),
                   out[index[p]]);
        }
      }
    }
  }
}

// sums (kVectors * 16,) += the listed rows of grad_y at the given outputs, whole vectors of them, weighted.
template <int kVectors, class T>
SPARSEKERN_INLINE void add_samples(const T* grad_y, int64_t O, const int64_t* outputs, const Entry<acc_t<T>>* entries,
                                   int32_t count, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int kRegs = kLanes / kRegLanes<A>;
  reg<A> sum[kVectors * kRegs];
#pragma GCC unroll 8
  for (int r = 0; r < kVectors * kRegs; r++) sum[r] = load_reg(sums + r * kRegLanes<A>);
  for (int32_t p = 0; p < count; p++) {
    reg<A> a;
    const T* row = grad_y + read_entry(entries[p], a) * O;
#pragma GCC unroll 8
    for (int r = 0; r < kVectors * kRegs; r++)
      sum[r] = fma_reg(a, load_reg(row + outputs[r / kRegs] + r % kRegs * kRegLanes<A>), sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kVectors * kRegs; r++) store_reg(sums + r * kRegLanes<A>, sum[r]);
}

// The same for one vector of outputs that reaches beyond O, or lies there; sums beyond stay, whatever the values are.
template <class T>
void add_last_samples(const T* grad_y, int64_t O, int64_t output, const Entry<acc_t<T>>* entries, int32_t count,
                      acc_t<T>* sums) {
  for (const auto* entry = entries; entry < entries + count && output < O; entry++)
    store_first(sums, fma(splat(entry->value), load_first(grad_y + entry->place * O + output, O - output), load(sums)),
                O - output);
}

// The same of one row: each block is an input times its outputs' gradients.
template <class T>
void grad_weight_blocks_of_row(const LinearSupport& w, const T* grad_y, const T* x, T* grad, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t O = w.outputs, G = w.group;
  const vec<A> zeros{};
  for (int64_t i = begin; i < end; i++) {
    const vec<A> value = splat(to_acc(x[i]));
    const bool zero = to_acc(x[i]) == 0;
    for (int64_t b = w.ccol[i]; b < w.ccol[i + 1]; b++)
      for (int64_t g = 0, o = int64_t(w.rows[b]) * G; g < G; g += kLanes, o += kLanes) {
        T* to = grad + b * G + g;
        if (zero || o + kLanes > O) store(to, zeros); // lanes beyond O stay zero, whatever x is
        if (!zero && o < O) store_first(to, value * load_first(grad_y + o, O - o), O - o);
      }
  }
}

// The blocks of inputs [begin, end) of grad_y^T x, summed over B rows in ascending order.
template <class T>
void grad_weight_blocks(const LinearSupport& w, const T* grad_y, const T* x, T* grad, int64_t B, int64_t begin,
                        int64_t end) {
  if (B == 1) return grad_weight_blocks_of_row(w, grad_y, x, grad, begin, end);
  using A = acc_t<T>;
  constexpr int64_t kInputs = 64, kSamplesAtOnce = 128;
  constexpr int kRegs = kLanes / kRegLanes<A>, kTogether = kRegs > 4 ? 1 : kRegs > 2 ? 2 : 4;
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
        const Entry<A>* entries = lists.entries + lists.start[k];
        const int32_t n = lists.end[k] - lists.start[k];
        if (n == 0) continue;
        const int64_t last = (w.ccol[i + k + 1] - first) * vectors;
        const auto output = [&](int64_t v) {
          return int64_t(w.rows[first + v / vectors]) * G + v % vectors * kLanes;
        };
        int64_t v = (w.ccol[i + k] - first) * vectors;
        int64_t whole = last; // vectors from here on reach beyond O
        while (whole > v && output(whole - 1) + kLanes > O) whole--;
        for (; v + kTogether <= whole; v += kTogether) {
          int64_t o[kTogether];
          for (int64_t u = 0; u < kTogether; u++) o[u] = output(v + u);
          add_samples<kTogether>(grad_y + s * O, O, o, entries, n, sums + v * kLanes);
        }
        for (; v < whole; v++) {
          const int64_t o = output(v);
          add_samples<1>(grad_y + s * O, O, &o, entries, n, sums + v * kLanes);
        }
        for (; v < last; v++)
          add_last_samples(grad_y + s * O, O, output(v), entries, n, sums + v * kLanes);
      }
    }
    for (int64_t v = 0; v < count; v++) store(grad + first * G + v * kLanes, load(sums + v * kLanes));
  }
}

} // namespace
} // namespace sparsekern
