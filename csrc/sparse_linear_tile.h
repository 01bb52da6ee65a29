// The product of a few dense rows with a tile in the first-level cache, whose sums stay in registers.
#pragma once
#include "reg.h"
#include "sparse_linear.h"

namespace sparsekern {
namespace {

constexpr int64_t kTileColumns = kLinearPanel; // of the tile and of the sums in memory
// Sums of so many rows times so many registers fill the processor's, beside a broadcast and the registers of a tile's row.
constexpr int64_t kTileSums = 6;
#if defined(__AVX512F__)
constexpr int kTileRegs = 4;
#else
constexpr int kTileRegs = 2;
#endif

// sums (kRows, kTileColumns) += x (kRows, count) times tile (count, kTileColumns), at the first `columns` or some more. Element
// k of row r is x[r * kRowStep + k * kStep].
template <int64_t kRowStep, int64_t kStep, int kRows, class A>
void add_tile(const A* x, int64_t count, const A* tile, int64_t columns, A* sums) {
  constexpr int64_t kWidth = kTileRegs * kRegLanes<A>;
  for (int64_t c = 0; c < columns; c += kWidth) {
    reg<A> sum[kRows][kTileRegs];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kTileRegs; v++) sum[r][v] = load_reg(sums + r * kTileColumns + c + v * kRegLanes<A>);
    const A *at = x, *row = tile + c;
    for (int64_t k = 0; k < count; k++, at += kStep, row += kTileColumns) {
      reg<A> w[kTileRegs];
#pragma GCC unroll 4
      for (int v = 0; v < kTileRegs; v++) w[v] = load_reg(row + v * kRegLanes<A>);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++) {
        const reg<A> a = at[r * kRowStep] - reg<A>{};
#pragma GCC unroll 4
        for (int v = 0; v < kTileRegs; v++) sum[r][v] = fma_reg(a, w[v], sum[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kTileRegs; v++) store_reg(sums + r * kTileColumns + c + v * kRegLanes<A>, sum[r][v]);
  }
}

// Calls add.operator()<n>(first row) for n rows at a time, kTileSums of them but for the last.
template <class Add> SPARSEKERN_INLINE void for_rows(int64_t rows, Add add) {
  int64_t r = 0;
  for (; r + kTileSums <= rows; r += kTileSums) add.template operator()<int(kTileSums)>(r);
  switch (rows - r) {
    case 5: return add.template operator()<5>(r);
    case 4: return add.template operator()<4>(r);
    case 3: return add.template operator()<3>(r);
    case 2: return add.template operator()<2>(r);
    case 1: return add.template operator()<1>(r);
  }
}

// The same for any number of rows.
template <int64_t kRowStep, int64_t kStep, class A>
void add_tile(const A* x, int64_t rows, int64_t count, const A* tile, int64_t columns, A* sums) {
  for_rows(rows, [&]<int kRows>(int64_t r) {
    add_tile<kRowStep, kStep, kRows>(x + r * kRowStep, count, tile, columns, sums + r * kTileColumns);
  });
}

} // namespace
} // namespace sparsekern
