// Sparse rows: the non-zeros of a row of activations or gradients as values and indices.
#pragma once
#include "entries.h"

namespace sparsekern {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

enum Slot { kValues, kIndices, kSums, kSamples, kTiles, kLists, kTail, kShared };

template <class T> SPARSEKERN_INLINE void fetch(const T* p, int64_t n) {
  for (int64_t e = 0; e < n; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + e);
}

// value and index of the non-zeros of x (n,), ascending; returns how many. Both need room for n + 16: whole registers
// are stored.
template <class T>
SPARSEKERN_INLINE int64_t compress(const T* x, int64_t n, acc_t<T>* value, int32_t* index) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  // A register is compressed and stored whole: compressing to memory is microcoded on some processors.
  if constexpr (sizeof(acc_t<T>) == 4) {
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i < n; i += kLanes, at = _mm512_add_epi32(at, _mm512_set1_epi32(kLanes))) {
      const __m512 v = (__m512)load_first(x + i, n - i);
      const __mmask16 nonzero = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      _mm512_storeu_ps(value + count, _mm512_mask_compress_ps((__m512)fresh(), nonzero, v));
      _mm512_storeu_si512(index + count, _mm512_mask_compress_epi32(fresh(), nonzero, at));
      count += __builtin_popcount(nonzero);
    }
    return count;
  }
#endif
  for (; i < n; i++) {
    const acc_t<T> v = to_acc(x[i]);
    value[count] = v;
    index[count] = int32_t(i);
    count += v != 0;
  }
  return count;
}

// Non-zeros among n < 2^31 elements: sums of 32 bits vectorise.
template <class T> int64_t count(const T* x, int64_t n) {
  int32_t nonzeros = 0;
  for (int64_t i = 0; i < n; i++) nonzeros += to_acc(x[i]) != 0;
  return nonzeros;
}

// The non-zeros of `rows` rows within one range of columns. To visit the rows by rising count, so that the branches of
// loops over them are foreseen, cost more than it saved: the rows' sums then no longer stream from the second-level cache.
template <class A> struct RowLists {
  Entry<A>* entries; // places: of the column's row in a tile of weights
  int32_t *start, *end; // (rows,): each row's entries
};

constexpr int64_t kMaxColumns = 128;

// Room for `rows` rows of at most `columns` non-zeros.
template <class A> RowLists<A> allocate_lists(int slot, int64_t rows, int64_t columns) {
  const size_t room = size_t(rows * columns + kLanes);
  RowLists<A> lists;
  lists.entries = (Entry<A>*)scratch(slot, room * sizeof(Entry<A>) + size_t(rows) * 8);
  lists.start = (int32_t*)(lists.entries + room);
  lists.end = lists.start + rows;
  return lists;
}

// Of x (rows, columns; stride); column c is tile row c of `width` elements.
template <class T>
void fill_lists(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, RowLists<acc_t<T>> lists) {
  int32_t filled = 0;
  for (int64_t s = 0; s < rows; s++) {
    lists.start[s] = filled;
    fetch(x + min(s + 8, rows - 1) * stride, columns); // 1600 -> 1000, density 0.4: 1,024 rows take a twentieth less
    for (int64_t c = 0; c < columns; c += kLanes)
      filled += list_nonzeros(x + s * stride + c, min(columns - c, kLanes), c, width, lists.entries + filled);
    lists.end[s] = filled;
  }
}

// Of the transpose of x (columns, rows; stride): row first + r of the lists is column r of x. rows is at most 64.
template <class T>
void fill_transposed_lists(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t width,
                           RowLists<acc_t<T>> lists, int64_t first = 0) {
  using A = acc_t<T>;
  A value[64 + kLanes];
  int32_t index[64 + kLanes];
  for (int64_t r = first; r < first + rows; r++) lists.start[r] = lists.end[r] = int32_t(r * columns);
  for (int64_t c = 0; c < columns; c++) {
    const int64_t count = compress(x + c * stride, rows, value, index);
    for (int64_t p = 0; p < count; p++)
      lists.entries[lists.end[first + index[p]]++] = {value[p], typename Entry<A>::Place(c * width)};
  }
}

} // namespace
} // namespace sparsekern
