// Sparse rows times a dense matrix whose tiles of kPanel columns stay in the first-level cache.
#pragma once
#include "sparse_linear.h"
#include "sparse_linear_bits.h"
#include "sparse_linear_rows.h"
#include "sparse_linear_tile.h"

namespace sparsekern {
namespace {

// Columns of a panel: four accumulators hide the latency of fused multiply-adds.
constexpr int64_t kPanel = kLinearPanel;
static_assert(kPanel == 4 * kLanes);

// Rows of a tile: with kPanel columns 20 KB, which leaves room in a first-level cache of 32 KB for what streams by.
template <class A> constexpr int64_t kTileRows = 320 / int64_t(sizeof(A));

// Registers of sums that are carried through a loop together: with a broadcast and a product they stay in registers.
constexpr int kMaxSums = 8;

// Neighbouring panels that are taken together, where a panel's sums are half of what a loop can carry and each multiply-add
// waits for the last one of its sum: on Zen 5 backward passes take a twentieth to a tenth less, forward ones nothing up to
// 64 rows and more beyond. Their tiles take 40 KB of the first-level cache's 48; half the rows of each gained nothing.
template <class A> constexpr int kPanelRegs = int(kPanel / kRegLanes<A>);
template <class A> int64_t panels_together() { return 2 * kPanelRegs<A> <= kMaxSums && processor().wide ? 2 : 1; }

// Where register i of a row of panels lies, in their tiles or, `step` elements apart, elsewhere.
template <class A> SPARSEKERN_INLINE int64_t panel_reg(int i, int64_t step = kTileRows<A> * kPanel) {
  return i / kPanelRegs<A> * step + i % kPanelRegs<A> * kRegLanes<A>;
}

// The sums (rows, kRegs registers; stride) of each panel, `step` apart, += the listed rows of its tile (kTileRows, kPanel),
// weighted.
template <int kPanels, int kRegs, class A>
void add_panel(RowLists<A> lists, int64_t rows, const A* tile, A* sums, int64_t stride, int64_t step = 0) {
  constexpr int kAll = kPanels * kRegs;
  for (int64_t s = 0; s < rows; s++) {
    int32_t p = lists.start[s];
    const int32_t end = lists.end[s];
    if (p == end) continue;
    reg<A> sum[kAll];
#pragma GCC unroll 8
    for (int i = 0; i < kAll; i++) sum[i] = load_reg(sums + s * stride + panel_reg<A>(i, step));
    for (; p < end; p++) {
      reg<A> a;
      const A* row = tile + read_entry(lists.entries[p], a);
#pragma GCC unroll 8
      for (int i = 0; i < kAll; i++) sum[i] = fma_reg(a, load_reg(row + panel_reg<A>(i)), sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kAll; i++) store_reg(sums + s * stride + panel_reg<A>(i, step), sum[i]);
  }
}

// The same for the first `columns` columns of one panel, by as few vectors of sixteen as they need.
template <class A>
void add_columns(RowLists<A> lists, int64_t rows, int64_t columns, const A* tile, A* sums, int64_t stride) {
  constexpr int kRegs = kLanes / kRegLanes<A>; // of a vector
  constexpr int kVectors = kRegs * 4 <= kMaxSums ? 4 : kRegs * 2 <= kMaxSums ? 2 : 1;
  for (; columns > 0; columns -= kVectors * kLanes, tile += kVectors * kLanes, sums += kVectors * kLanes) {
    if (kVectors == 4 && columns > 3 * kLanes) add_panel<1, kRegs * min(kVectors, 4)>(lists, rows, tile, sums, stride);
    else if (kVectors == 4 && columns > 2 * kLanes) add_panel<1, kRegs * min(kVectors, 3)>(lists, rows, tile, sums, stride);
    else if (kVectors >= 2 && columns > kLanes) add_panel<1, kRegs * min(kVectors, 2)>(lists, rows, tile, sums, stride);
    else add_panel<1, kRegs>(lists, rows, tile, sums, stride);
  }
}

// The same for one panel or two together, of `columns` columns in all.
template <class A>
void add_panels(RowLists<A> lists, int64_t rows, int64_t columns, const A* tile, A* sums, int64_t stride, int64_t step) {
  if (columns <= kPanel) return add_columns(lists, rows, columns, tile, sums, stride);
  if constexpr (2 * kPanelRegs<A> <= kMaxSums) add_panel<2, kPanelRegs<A>>(lists, rows, tile, sums, stride, step);
}

SPARSEKERN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where column c of tile row 0 lies in tiles (panels, kTileRows, kPanel).
template <class A> SPARSEKERN_INLINE int64_t tile_column(int64_t c) {
  return int64_t(uint64_t(c) / kPanel * (kTileRows<A> * kPanel) + uint64_t(c) % kPanel);
}

// The first block of input i at or above a group.
SPARSEKERN_INLINE int64_t first_block(const LinearSupport& w, int64_t i, int64_t group) {
  int64_t low = w.ccol[i], high = w.ccol[i + 1];
  if (group <= 0) return low;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (w.rows[middle] < group) low = middle + 1;
    else high = middle;
  }
  return low;
}

// out (rows, count; out_stride) = x (rows, count; stride), and some more elements of each row.
template <class T>
void load_rows(const T* x, int64_t stride, int64_t rows, int64_t count, acc_t<T>* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < count; c += kLanes) store(out + r * out_stride + c, load_first(x + r * stride + c, count - c));
}

// y (rows, columns) += x M for rows x (rows, K; stride K) and a dense matrix M (K, columns), of which `tiles` lays
// out `count` rows at a time: begin(first, count) prepares them, panel(c, slot) gives the tile (kTileRows, kPanel) of panel
// c, behind the last one's if slot is 1. The sums (panels, rows, kPanel) hold y. If `all`, zeros of x are multiplied too.
template <class T, class Tiles>
void multiply_rows(const T* x, int64_t K, int64_t rows, int64_t columns, bool all, acc_t<T>* sums, Tiles tiles) {
  using A = acc_t<T>;
  constexpr int64_t kDepth = kTileRows<A>;
  const RowLists<A> lists = all ? RowLists<A>{} : allocate_lists<A>(kLists, rows, kDepth);
  // Whole vectors are written, some of them beyond a row.
  A* part = all ? (A*)scratch(kLists, size_t(rows * kDepth + kLanes) * sizeof(A)) : nullptr;
  for (int64_t first = 0; first < K; first += kDepth) {
    const int64_t count = min(kDepth, K - first);
    tiles.begin(first, count);
    if (all) load_rows(x + first, K, rows, count, part, kDepth);
    else fill_lists(x + first, K, rows, count, kPanel, lists);
    const int64_t together = all ? 1 : panels_together<A>();
    for (int64_t c = 0; c * kPanel < columns; c += together) {
      const int64_t width = min(columns - c * kPanel, together * kPanel);
      const A* tile = tiles.panel(c, 0);
      if (width > kPanel) tiles.panel(c + 1, 1);
      A* sum = sums + c * rows * kPanel;
      if (all) add_tile<kDepth, 1>(part, rows, count, tile, width, sum);
      else add_panels(lists, rows, width, tile, sum, kPanel, rows * kPanel);
    }
  }
}

template <class A> A* allocate_tiles(int64_t columns) {
  return (A*)scratch(kTiles, size_t(round_up(columns, kPanel) * kTileRows<A>) * sizeof(A));
}

// The dense (I, O) weights at outputs [first, last), from the stored blocks: an input's row is filled, then cut up.
template <class T> struct WeightTiles {
  using A = acc_t<T>;
  const LinearSupport& w;
  const T* weight;
  int64_t first, last;
  A* tiles;
  A* row; // (panels * kPanel,), zeros between uses

  WeightTiles(const LinearSupport& w_, const T* weight_, int64_t first_, int64_t last_)
      : w(w_), weight(weight_), first(first_), last(last_), tiles(allocate_tiles<A>(last - first)) {
    const size_t size = size_t(round_up(last - first, kPanel)) * sizeof(A);
    row = (A*)scratch(kValues, size);
    std::memset((void*)row, 0, size);
  }
  void fill_row(int64_t i) {
    const int64_t G = w.group, from = first_block(w, i, first / G);
    const int64_t to = last == w.outputs ? w.ccol[i + 1] : first_block(w, i, (last + G - 1) / G);
    if (G == 1)
      for (int64_t b = from; b < to; b++) row[w.rows[b] - first] = to_acc(weight[b]);
    else if (G == kLanes)
      for (int64_t b = from; b < to; b++) store(row + (w.rows[b] * G - first), load(weight + b * G));
    else
      for (int64_t b = from; b < to; b++)
        for (int64_t g = 0, o = w.rows[b] * G - first; g < G; g++, o++)
          if (o >= 0 && o < last - first) row[o] = to_acc(weight[b * G + g]);
  }
  void begin(int64_t i, int64_t count) {
    for (int64_t r = 0; r < count; r++) {
      fill_row(i + r);
      A* to = tiles + r * kPanel;
      for (int64_t c = 0; c < last - first; c += kPanel, to += kTileRows<A> * kPanel)
        for (int64_t v = 0; v < kPanel; v += kLanes) {
          store(to + v, load(row + c + v));
          store(row + c + v, vec<A>{});
        }
    }
  }
  const A* panel(int64_t c, int) const { return tiles + c * (kTileRows<A> * kPanel); }
};

// The same for G = 1 by the bitmap: each tile is filled just before its use, while it is in the first-level cache.
template <class T> struct BitTiles {
  using A = acc_t<T>;
  const LinearSupport& w;
  const PaddedWeights<T> weights;
  int64_t first_word;
  A* tile;
  int64_t input, rows;
  const T* at[kTileRows<A>]; // each input's next weight

  BitTiles(const LinearSupport& w_, const T* weight, int64_t first)
      : w(w_), weights(w_, weight), first_word(first / kPanel), tile(allocate_tiles<A>(2 * kPanel)) {}
  void begin(int64_t i, int64_t count) {
    input = i, rows = count;
    for (int64_t r = 0; r < count; r++) at[r] = weights.of_input(i + r) + weights_before(w, i + r, first_word);
  }
  const A* panel(int64_t c, int slot) {
    const int64_t words = bit_words(w);
    const uint64_t* word = w.bits + input * words + first_word + c;
    A* to = tile + slot * (kTileRows<A> * kPanel);
    for (int64_t r = 0; r < rows; r++, word += words, to += kPanel) {
      at[r] = expand_word(*word, at[r], [&](int v, vec<A> x) { store(to + v * kLanes, x); });
      __builtin_prefetch(at[r] + kLanes), __builtin_prefetch(at[r] + 2 * kLanes), __builtin_prefetch(word + 8);
    }
    return to - rows * kPanel;
  }
};

// Sums (panels, rows, kPanel) to rows [begin, begin + rows) and columns [first, first + columns) of y (B, O).
template <class T, class Get>
void store_sums(T* y, int64_t stride, int64_t rows, int64_t columns, Get get) {
  for (int64_t s = 0; s < rows; s++)
    for (int64_t c = 0; c < columns; c += kLanes) store_first(y + s * stride + c, get(s, c), columns - c);
}

// Outputs [first, last) of x W^T + bias for rows [begin, end).
template <class T>
void forward_panels(const LinearSupport& w, const T* x, const T* weight, const T* bias, bool all, T* y, int64_t begin,
                    int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t rows = end - begin, columns = last - first, K = w.inputs;
  if (columns == 0) return; // first is a multiple of kPanel elsewhere, and so of a group of sixteen
  A* sums = (A*)scratch(kSums, size_t(rows * round_up(columns, kPanel)) * sizeof(A));
  for (int64_t c = 0; c < round_up(columns, kPanel); c += kLanes) {
    const vec<A> start = bias && c < columns ? load_first(bias + first + c, columns - c) : vec<A>{};
    A* sum = sums + c / kPanel * (rows * kPanel) + c % kPanel;
    for (int64_t s = 0; s < rows; s++) store(sum + s * kPanel, start);
  }
  if (has_bits<T>(w)) multiply_rows(x + begin * K, K, rows, columns, all, sums, BitTiles<T>(w, weight, first));
  else multiply_rows(x + begin * K, K, rows, columns, all, sums, WeightTiles<T>(w, weight, first, last));
  store_sums(y + begin * w.outputs + first, w.outputs, rows, columns, [&](int64_t s, int64_t c) {
    return load(sums + c / kPanel * (rows * kPanel) + s * kPanel + c % kPanel);
  });
}

// Rows [begin, end) of grad_y (B, O) as tiles: (ceil(B / kTileRows), panels, kTileRows, kPanel), zeros beyond O.
template <class T>
void tile_rows(const T* grad_y, int64_t O, acc_t<T>* tiles, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t columns = round_up(O, kPanel);
  for (int64_t s = begin; s < end; s++) {
    A* row = tiles + s / kTileRows<A> * kTileRows<A> * columns + s % kTileRows<A> * kPanel;
    for (int64_t c = 0; c < columns; c += kLanes)
      store(row + tile_column<A>(c), c < O ? load_first(grad_y + s * O + c, O - c) : vec<A>{});
  }
}

// The stored weights among 64 outputs of an input, from their sums: whole vectors are written where that stays within the
// input. Returns where the next ones go.
template <class T>
SPARSEKERN_INLINE int64_t pack_word(uint64_t word, const vec<acc_t<T>>* sum, T* grad, int64_t to, int64_t stop) {
  const int64_t last = to + __builtin_popcountll(word);
  const bool whole = last + kLanes <= stop;
  for (int v = 0; v < 4; v++) {
    const uint32_t mask = uint32_t(word >> (16 * v) & 0xffff);
    const int64_t count = __builtin_popcount(mask);
    const vec<acc_t<T>> packed = pack(mask, sum[v]);
    if (whole) store(grad + to, packed);
    else store_first(grad + to, packed, count);
    to += count;
  }
  return last;
}

// The blocks of inputs [begin, end) of grad_y^T x for one tile of grad_y, G = 1: an input's sums for 64 outputs stay in
// registers and go straight to the stored weights.
template <class T>
void grad_weight_tile(const LinearSupport& w, const acc_t<T>* tile, const T* x, T* grad, int64_t B, int64_t begin,
                      int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kInputs = 256;
  const int64_t panels = round_up(w.outputs, kPanel) / kPanel, words = bit_words(w);
  const RowLists<A> lists = allocate_lists<A>(kLists, kInputs, B);
  int32_t next[kInputs];
  for (int64_t i = begin; i < end; i += kInputs) {
    const int64_t inputs = min(kInputs, end - i);
    for (int64_t k = 0; k < inputs; k += 64)
      fill_transposed_lists(x + i + k, w.inputs, min(64, inputs - k), B, kPanel, lists, k);
    for (int64_t k = 0; k < inputs; k++) next[k] = w.ccol[i + k];
    const auto add = [&]<int kPanels>(int64_t c) {
      constexpr int kAll = kPanels * kPanelRegs<A>, kAtOnce = min(kAll, kMaxSums);
      const A* panel = tile + c * (kTileRows<A> * kPanel);
      for (int64_t k = 0; k < inputs; k++) {
        reg<A> sum[kAll] = {};
        const int32_t stop = lists.end[k];
        for (int part = 0; part < kAll; part += kAtOnce)
          for (int32_t p = lists.start[k]; p < stop; p++) {
            reg<A> a;
            const A* row = panel + read_entry(lists.entries[p], a);
#pragma GCC unroll 8
            for (int i = part; i < part + kAtOnce; i++) sum[i] = fma_reg(a, load_reg(row + panel_reg<A>(i)), sum[i]);
          }
        if (has_bits<T>(w)) {
          vec<A> whole[kPanels][4];
          std::memcpy(whole, sum, sizeof whole);
          const uint64_t* word = w.bits + (i + k) * words + c;
          for (int p = 0; p < kPanels; p++)
            next[k] = int32_t(pack_word(word[p], whole[p], grad, next[k], w.ccol[i + k + 1]));
          for (int p = 1; p <= 2 * kPanels; p++) __builtin_prefetch(grad + next[k] + p * kLanes, 1);
          continue;
        }
        A lanes[kPanels * kPanel];
        std::memcpy(lanes, sum, sizeof lanes);
        const int32_t until = int32_t(min((c + kPanels) * kPanel, w.outputs)), last = w.ccol[i + k + 1];
        int32_t b = next[k];
        for (; b < last && w.rows[b] < until; b++) from_acc(lanes[w.rows[b] - c * kPanel], grad[b]);
        next[k] = b;
      }
    };
    int64_t c = 0;
    if constexpr (2 * kPanelRegs<A> <= kMaxSums)
      for (; panels_together<A>() == 2 && c + 2 <= panels; c += 2) add.template operator()<2>(c);
    for (; c < panels; c++) add.template operator()<1>(c);
  }
}

// sums (rows, kPanel) from a column on are zeros, as what is stored beyond the last output is.
template <class A> void clear_beyond(int64_t column, int64_t rows, A* sums) {
  for (int64_t r = 0; column < kPanel && r < rows; r++)
    for (int64_t c = column < 0 ? 0 : column; c < kPanel; c++) sums[r * kPanel + c] = 0;
}

// The same for any number of rows and all of x, its zeros too. By a bitmap, or G a multiple of sixteen.
template <class T>
void grad_weight_all(const LinearSupport& w, const acc_t<T>* tiles, const T* x, T* grad, int64_t B, int64_t begin,
                     int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kInputs = 8 * kTileSums;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, vectors = G / kLanes, size = round_up(O, kPanel) * kTileRows<A>;
  A* part = (A*)scratch(kLists, size_t(B * kInputs) * sizeof(A));
  A* sums = (A*)scratch(kSums, size_t(kInputs * kPanel) * sizeof(A));
  int64_t next[kInputs]; // in sixteens for groups of them
  for (int64_t i = begin; i < end; i += kInputs) {
    const int64_t inputs = min(kInputs, end - i);
    load_rows(x + i, I, B, inputs, part, kInputs);
    for (int64_t k = 0; k < inputs; k++) next[k] = w.ccol[i + k] * (G == 1 ? 1 : vectors);
    for (int64_t c = 0; c * kPanel < round_up(O, G); c++) {
      std::memset((void*)sums, 0, size_t(inputs * kPanel) * sizeof(A));
      if (c * kPanel < O)
        for (int64_t s = 0, t = 0; s < B; s += kTileRows<A>, t++)
          add_tile<1, kInputs>(part + s * kInputs, inputs, min(kTileRows<A>, B - s),
                               tiles + t * size + c * (kTileRows<A> * kPanel), min(kPanel, O - c * kPanel), sums);
      clear_beyond(O - c * kPanel, inputs, sums); // infinite times zero
      for (int64_t k = 0; k < inputs; k++) {
        const A* sum = sums + k * kPanel;
        int64_t to = next[k];
        const int64_t last = w.ccol[i + k + 1] * (G == 1 ? 1 : vectors);
        if (has_bits<T>(w)) {
          const vec<A> whole[4] = {load(sum), load(sum + kLanes), load(sum + 2 * kLanes), load(sum + 3 * kLanes)};
          to = pack_word(w.bits[(i + k) * bit_words(w) + c], whole, grad, to, last);
          __builtin_prefetch(grad + to + kLanes, 1), __builtin_prefetch(grad + to + 2 * kLanes, 1);
        } else {
          for (; to < last; to++) {
            const int64_t block = vectors == 1 ? to : to / vectors;
            const int64_t at = w.rows[block] * G + (to - block * vectors) * kLanes - c * kPanel;
            if (at >= kPanel) break;
            store(grad + to * kLanes, load(sum + at));
          }
        }
        next[k] = to;
      }
    }
  }
}

// The blocks of inputs [begin, end) of grad_y^T x from the tiles of grad_y.
template <class T>
void grad_weight_panels(const LinearSupport& w, const acc_t<T>* tiles, const T* x, bool all, T* grad, int64_t B, int64_t begin,
                        int64_t end) {
  using A = acc_t<T>;
  if (all) return grad_weight_all(w, tiles, x, grad, B, begin, end);
  if (w.group == 1 && B <= kTileRows<A>) return grad_weight_tile(w, tiles, x, grad, B, begin, end);
  constexpr int64_t kRows = 64;
  const int64_t O = w.outputs, G = w.group, stride = round_up(round_up(O, G), kPanel) + kLanes;
  const int64_t size = round_up(O, kPanel) * kTileRows<A>;
  A* sums = (A*)scratch(kSums, size_t(kRows * stride) * sizeof(A));
  const RowLists<A> lists = allocate_lists<A>(kLists, kRows, kTileRows<A>);
  const int64_t together = panels_together<A>();
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = end - i < kRows ? end - i : kRows;
    std::memset(sums, 0, size_t(rows * stride) * sizeof(A));
    for (int64_t s = 0, t = 0; s < B; s += kTileRows<A>, t++) {
      const int64_t count = B - s < kTileRows<A> ? B - s : kTileRows<A>;
      fill_transposed_lists(x + s * w.inputs + i, w.inputs, rows, count, kPanel, lists);
      for (int64_t c = 0; c < O; c += together * kPanel)
        add_panels(lists, rows, min(O - c, together * kPanel), tiles + t * size + tile_column<A>(c), sums + c, stride, kPanel);
    }
    for (int64_t r = 0; r < rows; r++) {
      const A* sum = sums + r * stride;
      const int64_t stop = w.ccol[i + r + 1];
      if (has_bits<T>(w)) pack_input(w, i + r, sum, grad, int64_t(w.ccol[end]));
      else if (G == 1)
        for (int64_t b = w.ccol[i + r]; b < stop; b++) from_acc(sum[w.rows[b]], grad[b]);
      else
        for (int64_t b = w.ccol[i + r]; b < stop; b++)
          for (int64_t g = 0, o = w.rows[b] * G; g < G; g++, o++) from_acc(o < O ? sum[o] : A(0), grad[b * G + g]);
    }
  }
}

} // namespace
} // namespace sparsekern
