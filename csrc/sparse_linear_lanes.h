// The input's gradient with one sample in each lane: a stored weight (G = 1) times the gradients of its output in up to 64
// samples is a few multiply-adds of whole registers, and nothing is laid out but the transposed samples.
#pragma once
#include "sparse_linear_transposed.h"

namespace sparsekern {
namespace {

// Samples at a time: four accumulators hide the latency of fused multiply-adds, kMaxSums of them stay in registers.
template <class A> constexpr int64_t kSampleLanes = kLanes * min(4, kMaxSums * kRegLanes<A> / kLanes);

// Outputs whose samples stay in the first-level cache, nearly, while all inputs go by: 64 to 256 of float were tried.
template <class A> constexpr int64_t kPartOutputs = 768 / int64_t(sizeof(A));

// For each input: sums (kRegs registers; stride kSampleLanes) += its weights of outputs below `until` times the samples.
// next[i] is the input's first weight that is still to come.
template <int kRegs, class T>
void add_part(const LinearSupport& w, const T* weight, const acc_t<T>* samples, int64_t first, int64_t last,
              int32_t until, int32_t* next, acc_t<T>* sums) {
  using A = acc_t<T>;
  for (int64_t i = first; i < last; i++, next++, sums += kSampleLanes<A>) {
    const int32_t stop = w.ccol[i + 1];
    int32_t b = *next;
    __builtin_prefetch(weight + next[kAheadInputs]);
    __builtin_prefetch(w.rows + next[kAheadInputs]);
    if (b == stop || w.rows[b] >= until) continue;
    reg<A> sum[kRegs];
#pragma GCC unroll 8
    for (int r = 0; r < kRegs; r++) sum[r] = load_reg(sums + r * kRegLanes<A>);
    do {
      const reg<A> a = to_acc(weight[b]) - reg<A>{};
      const A* row = samples + w.rows[b] * kSampleLanes<A>;
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; r++) sum[r] = fma_reg(a, load_reg(row + r * kRegLanes<A>), sum[r]);
    } while (++b < stop && w.rows[b] < until);
    *next = b;
#pragma GCC unroll 8
    for (int r = 0; r < kRegs; r++) store_reg(sums + r * kRegLanes<A>, sum[r]);
  }
}

// By as few vectors of sixteen samples as the rows need.
template <class T>
void add_part(const LinearSupport& w, const T* weight, const acc_t<T>* samples, int64_t rows, int64_t first,
              int64_t last, int32_t until, int32_t* next, acc_t<T>* sums) {
  constexpr int kRegs = kLanes / kRegLanes<acc_t<T>>, kMost = int(kSampleLanes<acc_t<T>> / kLanes);
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
  const auto add = [&]<int kVectors>() {
    add_part<kRegs * min(kVectors, kMost)>(w, weight, samples, first, last, until, next, sums);
  };
  if (vectors >= 4) add.template operator()<4>();
  else if (vectors == 3) add.template operator()<3>();
  else if (vectors == 2) add.template operator()<2>();
  else add.template operator()<1>();
}

// Inputs [first, last) of grad_y W for rows [begin, end), zero where x is zero if at_nonzeros. G = 1.
template <class T>
void grad_input_lanes(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x,
                      bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  constexpr int64_t kStep = kSampleLanes<A>;
  const int64_t I = w.inputs, O = w.outputs, columns = last - first;
  A* samples = (A*)scratch(kTiles, size_t(O * kStep) * sizeof(A));
  A* sums = (A*)scratch(kSums, size_t(round_up(columns, kLanes) * kStep) * sizeof(A));
  int32_t* next = (int32_t*)scratch(kIndices, size_t(columns + kAheadInputs) * 4);
  for (int64_t k = 0; k < kAheadInputs; k++) next[columns + k] = w.ccol[last];
  for (int64_t s = begin; s < end; s += kStep) {
    const int64_t rows = min(kStep, end - s);
    to_samples<kStep>(grad_y + s * O, O, rows, O, samples);
    std::memset((void*)sums, 0, size_t(round_up(columns, kLanes) * kStep) * sizeof(A));
    for (int64_t k = 0; k < columns; k++) next[k] = w.ccol[first + k];
    for (int64_t o = 0; o < O; o += kPartOutputs<A>)
      add_part(w, weight, samples, rows, first, last, int32_t(min(o + kPartOutputs<A>, O)), next, sums);
    from_samples<kStep>(sums, rows, columns, grad_x + s * I + first, I, at_nonzeros ? x + s * I + first : nullptr);
  }
}

enum class GradInput { panels, dots, lanes };

// Which of the three takes the least time, for all inputs alike: how these are split must not change a sum. Cycles for
// sixteen outputs of an input, as in sparse_linear_ways.h, whose lanes also tell short rows from long ones. Of 64 rows, a
// tenth of x and of grad_y not zero, one Zen 4 core: 1600 -> 1500 at 10 % density panels 0.84 ms, dots 0.97 ms, lanes
// 0.60 ms (where other work has taken the weights out of the caches, panels 1.0 and lanes 1.2 ms); 1600 -> 1000 at 40 %
// panels 0.58 ms, dots 0.71 ms, lanes 1.4 ms, the dense product 2.4 ms.
template <class T>
GradInput grad_input_way(const LinearSupport& w, const T* grad_y, const T* x, bool at_nonzeros, int64_t begin,
                         int64_t end) {
  if (w.group != 1) return GradInput::panels;
  const auto active = [&](const T* rows, int64_t n) {
    int64_t nonzeros = 0;
    for (int64_t s = begin; s < end; s++) nonzeros += count(rows + s * n, n);
    return double(nonzeros) / double(n);
  };
  const double d = double(w.ccol[w.inputs]) / (double(w.inputs) * double(w.outputs)), rows = double(end - begin);
  const double vectors = double((w.outputs + kLanes - 1) / kLanes);
  const bool wide = std::is_same_v<T, float> && panels_together<float>() == 2;
  const double once = 3 + 35 * d, each = (0.03 + 1.7 * d) * double(round_up(end - begin, kLanes));
  const double lanes = wide ? 0.85 * once * double((end - begin + 63) / 64) + 0.5 * each : once + each;
  double dots = lanes;
  if (at_nonzeros) {
    const double laid_out = has_bits<T>(w) ? 4.5 : 5 + 20 * d;
    dots = laid_out + (0.06 + 3 / vectors) * rows + (2.75 + 7 / vectors) * active(x, w.inputs);
  }
  const double products = active(grad_y, w.outputs);
  const double panels = !has_register_tiles<T>(w) ? 3 + 70 * d + 1.85 * products
                        : wide                    ? 6 + 0.09 * rows + 0.75 * products
                                                  : 8.5 + 0.1 * rows + 1.5 * products;
  if (panels < lanes && panels < dots) return GradInput::panels;
  return lanes <= dots ? GradInput::lanes : GradInput::dots;
}

} // namespace
} // namespace sparsekern
