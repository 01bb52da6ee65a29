// The input's gradient by panels: tiles of the transposed weights.
#pragma once
#include "sparse_linear_panels.h"
#include "transpose.h"

namespace sparsekern {
namespace {

constexpr int64_t kAheadInputs = 4; // by which weights are fetched in advance

// The transpose of the weights, (O, I), at inputs [first, last), from the stored blocks.
template <class T> struct TransposedTiles {
  using A = acc_t<T>;
  const LinearSupport& w;
  const T* weight;
  int64_t first, columns;
  A* tiles;
  int32_t* next; // each input's first block that is not laid out yet
  int64_t output, rows;

  TransposedTiles(const LinearSupport& w_, const T* weight_, int64_t first_, int64_t last)
      : w(w_), weight(weight_), first(first_), columns(last - first_), tiles(allocate_tiles<A>(2 * kPanel)) {
    next = (int32_t*)scratch(kIndices, size_t(columns) * 4);
    for (int64_t c = 0; c < columns; c++) next[c] = w.ccol[first + c];
  }
  void begin(int64_t o, int64_t count) { output = o, rows = count; }
  const A* panel(int64_t p, int slot) {
    const int64_t G = w.group, c = p * kPanel, count = columns - c < kPanel ? columns - c : kPanel;
    A* tile = tiles + slot * (kTileRows<A> * kPanel);
    std::memset((void*)tile, 0, size_t(kTileRows<A> * kPanel) * sizeof(A));
    for (int64_t k = 0; k < count; k++) {
      const int32_t stop = w.ccol[first + c + k + 1], ahead = next[min(c + k + kAheadInputs, columns - 1)];
      __builtin_prefetch(weight + ahead * G), __builtin_prefetch(w.rows + ahead);
      A* to = tile + k;
      int32_t b = next[c + k];
      if (G == 1) {
        const int32_t until = int32_t(output + rows);
        for (; b < stop && w.rows[b] < until; b++) to[(w.rows[b] - output) * kPanel] = to_acc(weight[b]);
        next[c + k] = b;
        continue;
      }
      for (; b < stop && w.rows[b] * G < output + rows; b++)
        for (int64_t g = 0, at = w.rows[b] * G - output; g < G; g++, at++)
          if (at >= 0 && at < rows) to[at * kPanel] = to_acc(weight[b * G + g]);
      // A block that reaches past this tile is laid out in the next one again.
      next[c + k] = b > next[c + k] && w.rows[b - 1] * G + G > output + rows ? b - 1 : b;
    }
    return tile;
  }
};

// Sixteen outputs of an input after the other, zeros where no weight exists. By the bitmap:
template <class T> struct BitWeights {
  struct Slot { // of an input
    const T* at; // its next weight
    const uint64_t* bits;
  };
  const LinearSupport& w;
  const PaddedWeights<T> weights;

  BitWeights(const LinearSupport& w_, const T* weight) : w(w_), weights(w_, weight) {}
  Slot start(int64_t i) const { return {weights.of_input(i), w.bits + i * bit_words(w)}; }
  SPARSEKERN_INLINE vec<float> get(Slot& slot, int64_t o) const {
    uint16_t mask; // x86 has a word's lowest bits first
    std::memcpy(&mask, (const char*)slot.bits + o / 8, sizeof mask);
    const T* at = slot.at;
    slot.at = at + __builtin_popcount(mask);
    return expand(mask, load(at));
  }
  // What a slot needs soon for tile row r and on.
  SPARSEKERN_INLINE void prefetch(const Slot& slot, int64_t o, int64_t r) const {
    __builtin_prefetch(slot.at + r);
    if (r == 0) __builtin_prefetch((const char*)slot.bits + o / 8);
  }
};

SPARSEKERN_INLINE vec<float> zero_unless(int32_t here, vec<float> v) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_maskz_mov_ps(__mmask16(-here), (__m512)v);
#else
  return here ? v : vec<float>{};
#endif
}

// Of blocks of sixteen, of which there is one at least. Without branches, which could not be foreseen: the next block is
// either here or not.
template <class T> struct BlockWeights {
  struct Slot {
    int32_t next, stop; // blocks
  };
  const LinearSupport& w;
  const T* weight;

  BlockWeights(const LinearSupport& w_, const T* weight_) : w(w_), weight(weight_) {}
  Slot start(int64_t i) const { return {w.ccol[i], w.ccol[i + 1]}; }
  SPARSEKERN_INLINE vec<float> get(Slot& slot, int64_t o) const {
    const int32_t left = slot.next < slot.stop, at = left ? slot.next : 0;
    const int32_t here = left & (w.rows[at] == int32_t(o / kLanes));
    slot.next += here;
    return zero_unless(here, load(weight + int64_t(at) * kLanes));
  }
  SPARSEKERN_INLINE void prefetch(const Slot&, int64_t, int64_t) const {} // 1 cycle slower with it
};

// The transpose of the weights, (O, I), at inputs [first, last): sixteen inputs at sixteen outputs are transposed in
// registers, which takes as long whatever the density.
template <class T, class Weights> struct RegisterTiles {
  using Slot = typename Weights::Slot;
  static_assert(kTileRows<float> % kLanes == 0);
  const Weights weights;
  int64_t columns;
  float* tile;
  Slot* slots; // of the columns, and beyond them copies of the last one's, whose weights go to columns that none looks at
  int64_t output, rows;

  RegisterTiles(const LinearSupport& w, const T* weight, int64_t first, int64_t last)
      : weights(w, weight), columns(last - first), tile(allocate_tiles<float>(2 * kPanel)) {
    const int64_t count = round_up(columns, kLanes) + kLanes;
    slots = (Slot*)scratch(kIndices, size_t(count) * sizeof(Slot));
    for (int64_t c = 0; c < count; c++) slots[c] = weights.start(min(first + c, last - 1));
  }
  void begin(int64_t o, int64_t count) { output = o, rows = count; }
  const float* panel(int64_t p, int slot) {
    float* const first = tile + slot * (kTileRows<float> * kPanel);
    float* to = first;
    for (int64_t c = p * kPanel; c < min((p + 1) * kPanel, columns); c += kLanes, to += kLanes)
      for (int64_t r = 0; r < rows; r += kLanes) {
        vec<float> v[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) {
          weights.prefetch(slots[c + kLanes + i], output + r, r);
          v[i] = weights.get(slots[c + i], output + r);
        }
        transpose(v);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) store(to + (r + i) * kPanel, v[i]);
      }
    return first;
  }
};

// Whether they are laid out so, which the support decides. The tiles are the same.
template <class T> SPARSEKERN_INLINE bool has_register_tiles(const LinearSupport& w) {
  if (!kHasExpand || sizeof(acc_t<T>) != 4 || !(w.group == kLanes || (w.group == 1 && has_bits<T>(w)))) return false;
  const double weights = double(w.inputs) * double((w.outputs + w.group - 1) / w.group);
  return double(w.ccol[w.inputs]) > kRegisterTiles * weights;
}

// Inputs [first, last) of grad_y W for rows [begin, end), zero where x is zero if at_nonzeros. If `all`, zeros of grad_y are
// multiplied too.
template <class T>
void grad_input_panels(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x,
                       bool at_nonzeros, bool all, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t rows = end - begin, columns = last - first, K = w.outputs;
  const size_t size = size_t(rows * round_up(columns, kPanel)) * sizeof(A);
  A* sums = (A*)scratch(kSums, size);
  std::memset((void*)sums, 0, size);
  const auto multiply = [&](auto tiles) { multiply_rows(grad_y + begin * K, K, rows, columns, all, sums, tiles); };
  if (!has_register_tiles<T>(w)) multiply(TransposedTiles<T>(w, weight, first, last));
  else if constexpr (kHasExpand && sizeof(A) == 4) {
    if (w.group == 1) multiply(RegisterTiles<T, BitWeights<T>>(w, weight, first, last));
    else multiply(RegisterTiles<T, BlockWeights<T>>(w, weight, first, last));
  }
  const T* where = x + begin * w.inputs + first;
  store_sums(grad_x + begin * w.inputs + first, w.inputs, rows, columns, [&](int64_t s, int64_t c) {
    const vec<A> sum = load(sums + c / kPanel * (rows * kPanel) + s * kPanel + c % kPanel);
    if (!at_nonzeros) return sum;
    return load_first(where + s * w.inputs + c, columns - c) != 0 ? sum : vec<A>{};
  });
}

} // namespace
} // namespace sparsekern
