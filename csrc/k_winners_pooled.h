// k-winners of maps that are normalised and max-pooled first, forward and backward.
#pragma once
#include <utility>

#include "k_winners_rows.h"

namespace sparsekern {
namespace {

// Element `column` of each of a register's windows along a line: neighbours' windows are kStep apart, 1 or 2.
template <int kStep, class T, int... kLane>
SPARSEKERN_INLINE reg<acc_t<T>> load_column(const T* x, int column, std::integer_sequence<int, kLane...>) {
  const reg<acc_t<T>> a = load_reg(x);
  if constexpr (kStep == 1) return a;
  const reg<acc_t<T>> b = load_reg(x + sizeof...(kLane));
  return column == 0 ? __builtin_shufflevector(a, b, (2 * kLane)...) : __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

// Maxima of n windows of pool x pool elements and where they are taken from. The first window begins at x[at], the next
// one kStep further; a window's elements are `column` and `row` apart. As in PyTorch, the first maximum counts and NaN is
// above all; with kStep = 2 columns are neighbours and pool is 2.
template <int kStep, class T>
SPARSEKERN_INLINE void pool_line(const T* x, int64_t at, int64_t n, int64_t step, int64_t pool, int64_t column,
                                 int64_t row, acc_t<T>* most, int32_t* taken) {
  using A = acc_t<T>;
  using K = key_t<T>;
  constexpr int kWidth = kRegLanes<A>;
  constexpr auto kAll = std::make_integer_sequence<int, kWidth>();
  int64_t i = 0;
  if constexpr (kStep > 0) {
    reg<K> lane;
    for (int l = 0; l < kWidth; l++) lane[l] = K(l * kStep);
    for (; i + kWidth <= n; i += kWidth) {
      const int64_t begin = at + i * kStep;
      reg<A> best = load_column<kStep>(x + begin, 0, kAll);
      reg<K> from = lane + K(begin);
      for (int64_t dy = 0; dy < pool; dy++)
        for (int64_t dx = 0; dx < pool; dx++) {
          const int64_t other = begin + dy * row + (kStep == 1 ? dx * column : 0);
          const reg<A> v = load_column<kStep>(x + other, int(dx), kAll);
          const reg<K> larger = (reg<K>)((v > best) | (v != v));
          best = larger ? v : best;
          from = larger ? lane + K(begin + dy * row + dx * column) : from;
        }
      std::memcpy(most + i, &best, sizeof best);
      for (int l = 0; sizeof(K) > 4 && l < kWidth; l++) taken[i + l] = int32_t(from[l]);
      if constexpr (sizeof(K) == 4) std::memcpy(taken + i, &from, sizeof from);
    }
  }
  for (; i < n; i++) {
    int64_t from = at + i * step;
    A best = to_acc(x[from]);
    for (int64_t dy = 0; dy < pool; dy++)
      for (int64_t dx = 0; dx < pool; dx++) {
        const int64_t other = at + i * step + dy * row + dx * column;
        const A v = to_acc(x[other]);
        const bool larger = (v > best) | (v != v);
        best = larger ? v : best;
        from = larger ? other : from;
      }
    most[i] = best;
    taken[i] = int32_t(from);
  }
}

// The same for n windows of 2 x 2 in two rows, `row` apart; what fills no register is copied into a whole one first, as rows
// of feature maps are short.
template <class T>
void pool_pairs(const T* x, int64_t at, int64_t n, int64_t row, acc_t<T>* most, int32_t* taken) {
  using A = acc_t<T>;
  constexpr int kWidth = kRegLanes<A>;
  const int64_t whole = n / kWidth * kWidth, rest = n - whole;
  pool_line<2>(x, at, whole, 2, 2, 1, row, most, taken);
  if (rest == 0) return;
  T pairs[4 * kWidth] = {};
  A rest_most[kWidth];
  int32_t rest_taken[kWidth];
  const int64_t begin = at + 2 * whole;
  for (int64_t i = 0; i < 2; i++) std::memcpy(pairs + i * 2 * kWidth, x + begin + i * row, size_t(2 * rest) * sizeof(T));
  pool_line<2>(pairs, 0, kWidth, 2, 2, 1, 2 * kWidth, rest_most, rest_taken);
  for (int64_t i = 0; i < rest; i++) {
    most[whole + i] = rest_most[i];
    const int64_t from = rest_taken[i];
    taken[whole + i] = int32_t(begin + (from < 2 * kWidth ? from : from - 2 * kWidth + row));
  }
}

// A map's pooled units, in its own order.
template <class T> void pool_map(const T* x, const PooledArgs& a, acc_t<T>* most, int32_t* taken) {
  const int64_t P = a.H / a.pool, Q = a.W / a.pool;
  if (a.channels_last)
    for (int64_t p = 0; p < P; p++)
      for (int64_t q = 0; q < Q; q++, most += a.C, taken += a.C) {
        const int64_t at = (p * a.W + q) * a.pool * a.C;
        if (a.pool == 2) pool_line<1>(x, at, a.C, 1, 2, a.C, a.W * a.C, most, taken);
        else pool_line<1>(x, at, a.C, 1, a.pool, a.C, a.W * a.C, most, taken);
      }
  else
    for (int64_t c = 0; c < a.C; c++)
      for (int64_t p = 0; p < P; p++, most += Q, taken += Q) {
        const int64_t at = (c * a.H + p * a.pool) * a.W;
        if (a.pool == 2) pool_pairs(x, at, Q, a.W, most, taken);
        else pool_line<0>(x, at, Q, a.pool, a.pool, 1, a.W, most, taken);
      }
}

// Pooled values normalised and rounded to T, in place.
template <class T> void normalise(const PooledArgs& a, acc_t<T>* most) {
  using A = acc_t<T>;
  const A *mean = static_cast<const A*>(a.mean), *scale = static_cast<const A*>(a.scale);
  const auto rounded = [](A v) {
    T stored;
    from_acc(v, stored);
    return to_acc(stored);
  };
  const int64_t locations = a.rows.n / a.C;
  if (a.channels_last)
    for (int64_t p = 0; p < locations; p++, most += a.C)
      for (int64_t c = 0; c < a.C; c++) most[c] = rounded((most[c] - mean[c]) * scale[c]);
  else
    for (int64_t c = 0; c < a.C; c++, most += locations)
      for (int64_t p = 0; p < locations; p++) most[p] = rounded((most[p] - mean[c]) * scale[c]);
}

// Where a unit stands in a row that may have another order.
SPARSEKERN_INLINE int64_t place_of(const int32_t* places, int64_t unit) { return places == nullptr ? unit : places[unit]; }

// map(row, most, taken): writes a row's pooled units and, unless offsets is null, where they were taken from.
template <class T, class Map>
void forward_pooled_rows(const PooledArgs& a, int64_t begin, int64_t end, int64_t* counts, const Map& map) {
  using A = acc_t<T>;
  using K = key_t<T>;
  const int64_t n = a.rows.n, k = a.rows.k;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes, bytes = padded / 8;
  K* keys = static_cast<K*>(scratch(kKeys, size_t(padded) * sizeof(K)));
  K* room = static_cast<K*>(scratch(kRoom, size_t(padded + kLanes) * sizeof(K)));
  int32_t* places = reinterpret_cast<int32_t*>(room); // the candidates are gone when the winners' places come
  int64_t* ties = static_cast<int64_t*>(scratch(kCounts, size_t(a.C) * 12));
  int32_t* lanes = a.channels_last && a.C % kLanes == 0 ? reinterpret_cast<int32_t*>(ties + a.C) : nullptr;
  if (lanes != nullptr) std::memset(lanes, 0, size_t(a.C) * sizeof(int32_t));
  A* most = static_cast<A*>(scratch(kPooled, size_t(padded) * (sizeof(A) + sizeof(int32_t))));
  int32_t* taken = reinterpret_cast<int32_t*>(most + padded);
  Guess<K> guess{};
  for (int64_t row = begin; row < end; row++) {
    T* y = static_cast<T*>(a.rows.y) + row * n;
    uint8_t* winners = a.rows.winners + row * bytes;
    if (k == 0) {
      std::memset(y, 0, size_t(n) * sizeof(T)), std::memset(winners, 0, size_t(bytes));
      continue;
    }
    map(row, most, taken);
    if (a.mean != nullptr) normalise<T>(a, most);
    K lo, hi;
    if (a.rows.factors != nullptr) make_keys<A, true>(most, a.rows.factors, n, keys, lo, hi);
    else make_keys<A, false>(most, nullptr, n, keys, lo, hi);
    int64_t surplus;
    const K t = threshold(keys, n, k, lo, hi, room, guess, surplus);
    if (surplus > 0) drop_ties(keys, a.rows, t, surplus, ties);
    // Without branches on single units, which would be mispredicted.
    int32_t* offsets = a.offsets == nullptr ? nullptr : a.offsets + row * k;
    int64_t count = 0, channel = 0; // the channel of unit j, where lanes are counted
    for (int64_t j = 0; j < padded; j += kLanes) {
      const uint32_t bits = mask_ge(keys + j, t);
      store_bits(winners + j / 8, bits);
      if (offsets != nullptr) count += compress(taken + j, bits, places + count);
      if constexpr (std::is_same_v<T, A>)
        if (a.places == nullptr) {
          if (j + kLanes <= n) keep(most + j, bits, y + j);
          else keep_first(most + j, bits, y + j, n - j);
        }
      if (lanes != nullptr) {
        add_bits(lanes + channel, bits);
        channel = channel + kLanes == a.C ? 0 : channel + kLanes;
      }
    }
    if (offsets != nullptr) std::memcpy(offsets, places, size_t(k) * sizeof(int32_t));
    if (!std::is_same_v<T, A> || a.places != nullptr) {
      std::memset(y, 0, size_t(n) * sizeof(T));
      for (int64_t j = 0; j < n; j += kLanes)
        for (uint32_t bits = load_bits(winners + j / 8); bits != 0; bits &= bits - 1) {
          const int64_t unit = j + __builtin_ctz(bits);
          T& to = y[place_of(a.places, unit)];
          if (std::is_same_v<T, A> || a.mean != nullptr) from_acc(most[unit], to);
          else to = static_cast<const T*>(a.rows.x)[row * a.C * a.H * a.W + *offsets++];
        }
    }
    if (lanes == nullptr) count_row(winners, a.rows, counts);
  }
  for (int64_t c = 0; lanes != nullptr && c < a.C; c++) counts[c] += lanes[c];
}

// Calls rows(begin, end) for parts of the rows: a 32-bit lane counter takes n / channels wins a row at most.
template <class F>
SPARSEKERN_INLINE void for_counted_rows(const PooledArgs& a, int64_t begin, int64_t end, const F& rows) {
  if (a.rows.n == 0) return;
  const int64_t step = (int64_t(1) << 30) / (a.rows.n / a.C + 1) + 1;
  for (int64_t row = begin; row < end; row += step) rows(row, row + step < end ? row + step : end);
}

inline void forward_pooled(const PooledArgs& a, int64_t begin, int64_t end, int64_t* counts) {
  for_counted_rows(a, begin, end, [&](int64_t begin, int64_t end) {
    dispatch(a.rows.dtype, [&]<class T>() {
      forward_pooled_rows<T>(a, begin, end, counts, [&](int64_t row, acc_t<T>* most, int32_t* taken) {
        pool_map(static_cast<const T*>(a.rows.x) + row * a.C * a.H * a.W, a, most, taken);
      });
    });
  });
}

inline void backward_pooled(DType dtype, const void* grad_y, const int32_t* places, const uint8_t* winners,
                            const int32_t* offsets, void* grad_x, int64_t n, int64_t k, int64_t map, int64_t begin,
                            int64_t end) {
  dispatch(dtype, [&]<class T>() {
    const int64_t bytes = (n + kLanes - 1) / kLanes * 2;
    for (int64_t row = begin; row < end; row++) {
      const T* g = static_cast<const T*>(grad_y) + row * n;
      T* out = static_cast<T*>(grad_x) + row * map;
      const int32_t* offset = offsets + row * k;
      std::memset(out, 0, size_t(map) * sizeof(T));
      for (int64_t j = 0; j < n; j += kLanes)
        for (uint32_t bits = load_bits(winners + row * bytes + j / 8); bits != 0; bits &= bits - 1)
          out[*offset++] = g[place_of(places, j + __builtin_ctz(bits))];
    }
  });
}

// One sample's channel means and sums of squared deviations from them: two passes while it is in the cache.
template <class T>
void moments_of(const T* x, bool channels_last, int64_t C, int64_t pixels, double* mean, double* squares, acc_t<T>* sums) {
  using A = acc_t<T>;
  if (!channels_last) {
    for (int64_t c = 0; c < C; c++, x += pixels) {
      for (int pass = 0; pass < 2; pass++) {
        const vec<A> centre = splat(pass == 0 ? A(0) : A(mean[c]));
        vec<A> total = {};
        for (int64_t p = 0; p < pixels; p += kLanes) {
          const int64_t n = pixels - p < kLanes ? pixels - p : kLanes;
          vec<A> v = load_first(x + p, n);
          if (pass == 1) {
            v -= centre;
            for (int64_t l = n; l < kLanes; l++) v[l] = 0;
            v *= v;
          }
          total += v;
        }
        (pass == 0 ? mean : squares)[c] = double(sum<A>(total)) / (pass == 0 ? double(pixels) : 1.0);
      }
    }
    return;
  }
  A* centres = sums + C;
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t c = 0; c < C; c++) sums[c] = 0;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t c = 0; c < C; c++) {
        const A v = to_acc(x[p * C + c]);
        if (pass == 0) sums[c] += v;
        else sums[c] += (v - centres[c]) * (v - centres[c]);
      }
    for (int64_t c = 0; c < C; c++) {
      (pass == 0 ? mean : squares)[c] = double(sums[c]) / (pass == 0 ? double(pixels) : 1.0);
      if (pass == 0) centres[c] = A(mean[c]);
    }
  }
}

inline void moments(DType dtype, const void* x, bool channels_last, int64_t C, int64_t pixels, double* moments, int64_t begin,
                    int64_t end) {
  dispatch(dtype, [&]<class T>() {
    auto* sums = static_cast<acc_t<T>*>(scratch(kPooled, size_t(2 * C) * sizeof(acc_t<T>)));
    for (int64_t row = begin; row < end; row++)
      moments_of(static_cast<const T*>(x) + row * C * pixels, channels_last, C, pixels, moments + row * 2 * C,
                 moments + (row * 2 + 1) * C, sums);
  });
}

inline void norm_grad_sums(const NormGradArgs& a, double* sums, int64_t begin, int64_t end) {
  const int64_t bytes = (a.n + kLanes - 1) / kLanes * 2;
  dispatch(a.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; row++) {
      const T *g = static_cast<const T*>(a.grad_y) + row * a.n, *y = static_cast<const T*>(a.y) + row * a.n;
      double* sum = sums + row * 2 * a.C;
      for (int64_t c = 0; c < 2 * a.C; c++) sum[c] = 0;
      for_winners(a.winners + row * bytes, a.n, a.C, a.inner, [&](int64_t u, int64_t c) {
        const int64_t at = place_of(a.places, u);
        const double gradient = double(to_acc(g[at]));
        sum[c] += gradient;
        sum[a.C + c] += gradient * double(to_acc(y[at]));
      });
    }
  });
}

inline void norm_grad(const NormGradArgs& a, const double* means, int64_t begin, int64_t end) {
  const int64_t bytes = (a.n + kLanes - 1) / kLanes * 2, map = a.C * a.pixels;
  dispatch(a.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const A *mean = static_cast<const A*>(a.mean), *scale = static_cast<const A*>(a.scale);
    A* constant = static_cast<A*>(scratch(kPooled, size_t(2 * a.C) * sizeof(A)));
    A* linear = constant + a.C; // of x in what reaches every element
    for (int64_t c = 0; c < a.C; c++) {
      linear[c] = A(-double(scale[c]) * double(scale[c]) * means[a.C + c]);
      constant[c] = A(-double(scale[c]) * means[c] + double(scale[c]) * double(scale[c]) * means[a.C + c] * double(mean[c]));
    }
    for (int64_t row = begin; row < end; row++) {
      const T *x = static_cast<const T*>(a.x) + row * map, *g = static_cast<const T*>(a.grad_y) + row * a.n;
      T* out = static_cast<T*>(a.grad_x) + row * map;
      if (a.channels_last)
        for (int64_t p = 0; p < a.pixels; p++)
          for (int64_t c = 0; c < a.C; c++) from_acc(to_acc(x[p * a.C + c]) * linear[c] + constant[c], out[p * a.C + c]);
      else
        for (int64_t c = 0; c < a.C; c++)
          for (int64_t p = c * a.pixels; p < (c + 1) * a.pixels; p++) from_acc(to_acc(x[p]) * linear[c] + constant[c], out[p]);
      const int32_t* offset = a.offsets + row * a.k;
      for_winners(a.winners + row * bytes, a.n, a.C, a.inner, [&](int64_t u, int64_t c) {
        const int64_t at = *offset++;
        from_acc(to_acc(x[at]) * linear[c] + constant[c] + scale[c] * to_acc(g[place_of(a.places, u)]), out[at]);
      });
    }
  });
}

} // namespace
} // namespace sparsekern
