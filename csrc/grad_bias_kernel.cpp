#include "grad_bias.h"

#include "vec.h"

namespace sparsekern {
namespace {

constexpr int64_t kBlock = 64; // channels that are summed at once, in registers
constexpr int kVectors = kBlock / kLanes;

// Sums rows of (n, O), channels first..last, and hands each sixteen sums to write(o, sums, count).
template <class T, class F>
SPARSEKERN_INLINE void sum_rows(const T* rows, int64_t n, int64_t O, int64_t first, int64_t last, const F& write) {
  using A = acc_t<T>;
  for (int64_t o = first; o < last; o += kBlock) {
    vec<A> acc[kVectors] = {};
    if (o + kBlock <= last) {
      for (int64_t r = 0; r < n; r++)
        for (int v = 0; v < kVectors; v++) acc[v] += load(rows + r * O + o + v * kLanes);
    } else {
      for (int v = 0; v * kLanes < last - o; v++)
        for (int64_t r = 0; r < n; r++)
          acc[v] += load_first(rows + r * O + o + v * kLanes, last - o - v * kLanes);
    }
    for (int v = 0; v < kVectors && o + v * kLanes < last; v++) {
      const int64_t left = last - o - v * kLanes;
      write(o + v * kLanes, acc[v], left < kLanes ? left : kLanes);
    }
  }
}

template <class T> acc_t<T> sum_neighbours(const T* p, int64_t n) {
  using A = acc_t<T>;
  vec<A> acc[kVectors] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock)
    for (int v = 0; v < kVectors; v++) acc[v] += load(p + i + v * kLanes);
  for (int v = 0; i < n; v++, i += kLanes) acc[v] += load_first(p + i, n - i);
  return sum<A>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

} // namespace

extern const GradBiasKernels SPARSEKERN_TABLE(grad_bias) = {
    .accumulator_bytes = [](DType dtype) { return dtype == DType::f64 ? 8 : 4; },
    .rows =
        [](DType dtype, const void* grad_y, int64_t n, int64_t O, void* sums, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            using A = acc_t<T>;
            sum_rows((const T*)grad_y, n, O, first, last,
                     [&](int64_t o, vec<A> v, int64_t count) { store_first((A*)sums + o, v, count); });
          });
        },
    .neighbours =
        [](DType dtype, const void* grad_y, int64_t n, void* sums, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            for (int64_t i = begin; i < end; i++) ((acc_t<T>*)sums)[i] = sum_neighbours((const T*)grad_y + i * n, n);
          });
        },
    .finish =
        [](DType dtype, const void* sums, int64_t parts, int64_t O, void* grad_bias, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            using A = acc_t<T>;
            sum_rows((const A*)sums, parts, O, first, last,
                     [&](int64_t o, vec<A> v, int64_t count) { store_first((T*)grad_bias + o, v, count); });
          });
        },
};

} // namespace sparsekern
