// Sparse rows times a dense matrix whose tiles of kPanel columns stay in the first-level cache.
#pragma once
#include "sparse_linear.h"
#include "sparse_linear_rows.h"

namespace sparsekern {
namespace {

// Columns of a panel: four accumulators hide the latency of fused multiply-adds.
constexpr int64_t kPanel = kLinearPanel;
static_assert(kPanel == 4 * kLanes);

// Rows of a tile: with kPanel columns 20 KB, which leaves room in a first-level cache of 32 KB for what streams by.
template <class A> constexpr int64_t kTileRows = 320 / int64_t(sizeof(A));

// sums (rows, kVectors * 16; stride) += the listed rows of the tile (kTileRows, kPanel), weighted.
template <int kVectors, class A>
void add_panel(RowLists<A> lists, int64_t rows, const A* tile, A* sums, int64_t stride) {
  for (int64_t q = 0; q < rows; q++) {
    const int64_t s = lists.order[q];
    int32_t p = lists.start[s];
    const int32_t end = lists.end[s];
    if (p == end) continue;
    vec<A> sum[kVectors];
    for (int v = 0; v < kVectors; v++) sum[v] = load(sums + s * stride + v * kLanes);
    for (; p < end; p++) {
      const vec<A> a = splat(lists.value[p]);
      const A* row = tile + lists.offset[p];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[v] = fma(a, load(row + v * kLanes), sum[v]);
    }
    for (int v = 0; v < kVectors; v++) store(sums + s * stride + v * kLanes, sum[v]);
  }
}

// The same for all panels of `columns` columns: tiles (panels, kTileRows, kPanel), sums (rows, columns; stride).
template <class A>
void add_panels(RowLists<A> lists, int64_t rows, int64_t columns, const A* tiles, A* sums, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kPanel, tiles += kTileRows<A> * kPanel, sums += kPanel) {
    const int64_t left = columns - c;
    if (left > 3 * kLanes) add_panel<4>(lists, rows, tiles, sums, stride);
    else if (left > 2 * kLanes) add_panel<3>(lists, rows, tiles, sums, stride);
    else if (left > kLanes) add_panel<2>(lists, rows, tiles, sums, stride);
    else add_panel<1>(lists, rows, tiles, sums, stride);
  }
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

// Row i of the dense (I, O) weights, columns [first, last), into a row of tiles.
template <class T>
SPARSEKERN_INLINE void spread_input(const LinearSupport& w, const T* weight, int64_t i, int64_t first, int64_t last,
                                    acc_t<T>* tiles) {
  using A = acc_t<T>;
  const int64_t G = w.group;
  const int64_t from = first_block(w, i, first / G);
  const int64_t to = last == w.outputs ? w.ccol[i + 1] : first_block(w, i, (last + G - 1) / G);
  if (G == 1) {
    for (int64_t b = from; b < to; b++) tiles[tile_column<A>(uint32_t(w.rows[b] - first))] = to_acc(weight[b]);
    return;
  }
  for (int64_t b = from; b < to; b++)
    for (int64_t g = 0, o = w.rows[b] * G; g < G; g++, o++)
      if (o >= first && o < last) tiles[tile_column<A>(o - first)] = to_acc(weight[b * G + g]);
}

// y (rows, columns) += x M for sparse rows x (rows, K; stride K) and a matrix M (K, columns) that `fill(first, count,
// tiles)` lays out `count` rows of at a time, in tiles that are zero before. `sums` (rows, stride) holds y.
template <class T, class Fill>
void multiply_rows(const T* x, int64_t K, int64_t rows, int64_t columns, acc_t<T>* sums, int64_t stride, Fill fill) {
  using A = acc_t<T>;
  const size_t size = size_t(round_up(columns, kPanel) * kTileRows<A>) * sizeof(A);
  A* tiles = (A*)scratch(kTiles, size);
  const RowLists<A> lists = allocate_lists<A>(kLists, rows, kTileRows<A>);
  for (int64_t first = 0; first < K; first += kTileRows<A>) {
    const int64_t count = K - first < kTileRows<A> ? K - first : kTileRows<A>;
    std::memset(tiles, 0, size);
    fill(first, count, tiles);
    fill_lists(x + first, K, rows, count, int32_t(kPanel), lists);
    add_panels(lists, rows, columns, tiles, sums, stride);
  }
}

// Outputs [first, last) of x W^T + bias for rows [begin, end).
template <class T>
void forward_panels(const LinearSupport& w, const T* x, const T* weight, const T* bias, T* y, int64_t begin,
                    int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t rows = end - begin, columns = last - first, stride = round_up(columns, kPanel) + kLanes;
  A* sums = (A*)scratch(kSums, size_t(rows * stride) * sizeof(A));
  for (int64_t s = 0; s < rows; s++)
    for (int64_t o = 0; o < stride; o++) sums[s * stride + o] = bias && o < columns ? to_acc(bias[first + o]) : A(0);
  multiply_rows(x + begin * w.inputs, w.inputs, rows, columns, sums, stride, [&](int64_t i, int64_t count, A* tiles) {
    for (const int64_t until = i + count; i < until; i++, tiles += kPanel) spread_input(w, weight, i, first, last, tiles);
  });
  for (int64_t s = 0; s < rows; s++)
    for (int64_t o = 0; o < columns; o++) from_acc(sums[s * stride + o], y[(begin + s) * w.outputs + first + o]);
}

// Inputs [first, last) of grad_y W for rows [begin, end), zero where x is zero if at_nonzeros.
template <class T>
void grad_input_panels(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x,
                       bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t rows = end - begin, columns = last - first, stride = round_up(columns, kPanel) + kLanes, G = w.group;
  A* sums = (A*)scratch(kSums, size_t(rows * stride) * sizeof(A));
  std::memset(sums, 0, size_t(rows * stride) * sizeof(A));
  int32_t* next = (int32_t*)scratch(kIndices, size_t(columns) * 4); // each input's first block that is not laid out yet
  for (int64_t c = 0; c < columns; c++) next[c] = w.ccol[first + c];
  multiply_rows(grad_y + begin * w.outputs, w.outputs, rows, columns, sums, stride,
                [&](int64_t o, int64_t count, A* tiles) {
    const int64_t until = o + count;
    for (int64_t c = 0; c < columns; c++) {
      A* column = tiles + tile_column<A>(c);
      const int64_t stop = w.ccol[first + c + 1];
      int64_t b = next[c];
      for (; b < stop && w.rows[b] * G < until; b++)
        for (int64_t g = 0, at = w.rows[b] * G - o; g < G; g++, at++)
          if (at >= 0 && at < count) column[at * kPanel] = to_acc(weight[b * G + g]);
      // A block that reaches past this tile is laid out in the next one again.
      next[c] = int32_t(b > next[c] && w.rows[b - 1] * G + G > until ? b - 1 : b);
    }
  });
  for (int64_t s = 0; s < rows; s++)
    for (int64_t c = 0; c < columns; c++) {
      const int64_t at = (begin + s) * w.inputs + first + c;
      from_acc(at_nonzeros && to_acc(x[at]) == 0 ? A(0) : sums[s * stride + c], grad_x[at]);
    }
}

// grad_y (B, O) as tiles: (ceil(B / kTileRows), panels, kTileRows, kPanel), zeros beyond B and O. Tiles [begin, end).
template <class T>
void tile_rows(const T* grad_y, int64_t B, int64_t O, acc_t<T>* tiles, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t size = round_up(O, kPanel) * kTileRows<A>;
  for (int64_t t = begin; t < end; t++)
    for (int64_t r = 0, s = t * kTileRows<A>; r < kTileRows<A> && s < B; r++, s++) {
      A* row = tiles + t * size + r * kPanel;
      for (int64_t c = 0; c < round_up(O, kPanel); c += kLanes)
        store(row + tile_column<A>(c), c < O ? load_first(grad_y + s * O + c, O - c) : vec<A>{});
    }
}

// The blocks of inputs [begin, end) of grad_y^T x from the tiles of grad_y.
template <class T>
void grad_weight_panels(const LinearSupport& w, const acc_t<T>* tiles, const T* x, T* grad, int64_t B, int64_t begin,
                        int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kRows = 64;
  const int64_t O = w.outputs, G = w.group, stride = round_up(round_up(O, G), kPanel) + kLanes;
  const int64_t size = round_up(O, kPanel) * kTileRows<A>;
  A* sums = (A*)scratch(kSums, size_t(kRows * stride) * sizeof(A));
  const RowLists<A> lists = allocate_lists<A>(kLists, kRows, kTileRows<A>);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = end - i < kRows ? end - i : kRows;
    std::memset(sums, 0, size_t(rows * stride) * sizeof(A));
    for (int64_t s = 0, t = 0; s < B; s += kTileRows<A>, t++) {
      const int64_t count = B - s < kTileRows<A> ? B - s : kTileRows<A>;
      fill_transposed_lists(x + s * w.inputs + i, w.inputs, rows, count, int32_t(kPanel), lists);
      add_panels(lists, rows, O, tiles + t * size, sums, stride);
    }
    for (int64_t r = 0; r < rows; r++) {
      const A* sum = sums + r * stride;
      const int64_t stop = w.ccol[i + r + 1];
      if (G == 1)
        for (int64_t b = w.ccol[i + r]; b < stop; b++) from_acc(sum[w.rows[b]], grad[b]);
      else
        for (int64_t b = w.ccol[i + r]; b < stop; b++)
          for (int64_t g = 0, o = w.rows[b] * G; g < G; g++, o++) from_acc(o < O ? sum[o] : A(0), grad[b * G + g]);
    }
  }
}

} // namespace
} // namespace sparsekern
