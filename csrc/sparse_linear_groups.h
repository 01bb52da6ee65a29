// By groups of outputs whatever is zero: sixteen outputs that share their inputs times one or more samples in registers, as
// in a dense product over the inputs that the group has.
#pragma once
#include "sparse_linear_group_pairs.h"
#include "sparse_linear_panels.h"
#include "transpose.h"

namespace sparsekern {
namespace {

// Registers of a block of sixteen.
template <class A> constexpr int kBlockRegs = kLanes / kRegLanes<A>;

// Inputs of a group whose weights and samples stay in the first-level cache.
constexpr int64_t kListPart = 128;
// to (count, kLanes) = the listed blocks of sixteen weights, the first `outputs` of each and zeros: the others may be anything.
template <class T>
void copy_blocks(const T* weight, int64_t step, const int32_t* source, int64_t count, int64_t outputs, acc_t<T>* to) {
  for (int64_t e = 0; e < count; e++) store(to + e * kLanes, load_first(weight + source[e] * step, outputs));
}

// sums (kHeld / kRegs outputs, kRegs registers; stride kGroupSamples) += weights (count, kLanes) of these outputs times x
// (inputs, kGroupSamples).
template <int kRegs, class A>
SPARSEKERN_INLINE void add_group(const A* x, const A* weight, const int32_t* input, int64_t count, A* sums) {
  constexpr int kOutputs = kHeld / kRegs;
  reg<A> sum[kOutputs][kRegs];
#pragma GCC unroll 16
  for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) sum[o][r] = load_reg(sums + o * kGroupSamples + r * kRegLanes<A>);
  for (int64_t e = 0; e < count; e++, weight += kLanes) {
    const A* row = x + input[e] * kGroupSamples;
    reg<A> v[kRegs];
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) v[r] = load_reg(row + r * kRegLanes<A>);
#pragma GCC unroll 16
    for (int o = 0; o < kOutputs; o++) {
      const reg<A> a = weight[o] - reg<A>{};
#pragma GCC unroll 2
      for (int r = 0; r < kRegs; r++) sum[o][r] = fma_reg(a, v[r], sum[o][r]);
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) store_reg(sums + o * kGroupSamples + r * kRegLanes<A>, sum[o][r]);
}

// to (inputs, kGroupSamples), at kRegs registers of samples, += weights (count, kLanes) of kHeld / kRegs outputs times their
// gradients (outputs, kGroupSamples).
template <int kRegs, class A>
SPARSEKERN_INLINE void add_gradients(const A* grad, const A* weight, const int32_t* input, int64_t count, A* to) {
  constexpr int kOutputs = kHeld / kRegs;
  reg<A> held[kOutputs][kRegs];
#pragma GCC unroll 16
  for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) held[o][r] = load_reg(grad + o * kGroupSamples + r * kRegLanes<A>);
  for (int64_t e = 0; e < count; e++, weight += kLanes) {
    A* at = to + input[e] * kGroupSamples;
    reg<A> sum[kRegs];
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) sum[r] = load_reg(at + r * kRegLanes<A>);
#pragma GCC unroll 16
    for (int o = 0; o < kOutputs; o++) {
      const reg<A> a = weight[o] - reg<A>{};
#pragma GCC unroll 2
      for (int r = 0; r < kRegs; r++) sum[r] = fma_reg(a, held[o][r], sum[r]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; r++) store_reg(at + r * kRegLanes<A>, sum[r]);
  }
}

// Calls add.operator()<kRegs>(sample, output) for all of sixteen outputs and some samples, `rows` or more.
template <class A, class Add> SPARSEKERN_INLINE void for_registers(int64_t rows, Add add) {
  int64_t r = 0;
  for (; rows - r > kRegLanes<A>; r += 2 * kRegLanes<A>)
    for (int64_t o = 0; o < kLanes; o += kHeld / 2) add.template operator()<2>(r, o);
  for (int64_t o = 0; r < rows && o < kLanes; o += kHeld) add.template operator()<1>(r, o);
}

// Groups [first, last) of rows [begin, end) of y.
template <class T>
void forward_groups(const LinearSupport& w, const LinearGroups& groups, const T* x, const T* weight, const T* bias, T* y,
                    int64_t begin, int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group;
  A* samples = (A*)scratch(kTiles, size_t((I + 1) * kGroupSamples) * sizeof(A)); // the last are zeros
  std::memset((void*)(samples + I * kGroupSamples), 0, kGroupSamples * sizeof(A));
  A* sums = (A*)scratch(kSums, size_t(kLanes * kGroupSamples) * sizeof(A));
  A* blocks = (A*)scratch(kValues, size_t(kListPart * kLanes) * sizeof(A));
  for (int64_t s = begin; s < end; s += kGroupSamples) {
    const int64_t rows = min(kGroupSamples, end - s);
    to_samples<kGroupSamples>(x + s * I, I, rows, I, samples);
    for (int64_t g = first; g < last; g++)
      for (int64_t o = g * G; o < min(O, (g + 1) * G); o += kLanes) {
        for (int64_t k = 0; k < kLanes; k++) {
          const vec<A> start = splat(bias && o + k < O ? to_acc(bias[o + k]) : A(0));
          for (int64_t r = 0; r < rows; r += kLanes) store(sums + k * kGroupSamples + r, start);
        }
        for (int64_t e = groups.starts[g]; e < groups.starts[g + 1]; e += kListPart) {
          const int64_t count = min(kListPart, groups.starts[g + 1] - e);
          if constexpr (std::is_same_v<T, bf16>)
            if (has_pairs()) {
              pair_blocks(weight + (o - g * G), G, groups.source + e, count, O - o, (uint32_t*)blocks);
              for_registers<A>(rows, [&]<int kRegs>(int64_t r, int64_t k) {
                add_group_pairs<kRegs>(samples + r, I, (uint32_t*)blocks + k, groups.input + e, count,
                                       sums + k * kGroupSamples + r);
              });
              continue;
            }
          copy_blocks(weight + (o - g * G), G, groups.source + e, count, O - o, blocks);
          for_registers<A>(rows, [&]<int kRegs>(int64_t r, int64_t k) {
            add_group<kRegs>(samples + r, blocks + k, groups.input + e, count, sums + k * kGroupSamples + r);
          });
        }
        from_samples<kGroupSamples>(sums, rows, min(kLanes, O - o), y + s * O + o, O);
      }
  }
}

// The first of the ascending numbers [begin, end) that is not below `bound`.
inline const int32_t* lower_bound(const int32_t* begin, const int32_t* end, int64_t bound) {
  while (begin < end) {
    const int32_t* middle = begin + (end - begin) / 2;
    if (*middle < bound) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

// Inputs [first, last) of rows [begin, end) of grad_x, zero where x is zero if at_nonzeros.
template <class T>
void grad_input_groups(const LinearSupport& w, const LinearGroups& groups, const T* grad_y, const T* x, const T* weight,
                       T* grad_x, bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, lists = (O + G - 1) / G, columns = last - first;
  const size_t bytes = size_t(round_up(columns, kLanes) * kGroupSamples) * sizeof(A);
  A* sums = (A*)scratch(kTiles, bytes);
  A* grad = (A*)scratch(kSums, size_t(kLanes * kGroupSamples) * sizeof(A));
  A* blocks = (A*)scratch(kValues, size_t(kListPart * kLanes) * sizeof(A));
  for (int64_t s = begin; s < end; s += kGroupSamples) {
    const int64_t rows = min(kGroupSamples, end - s);
    std::memset((void*)sums, 0, bytes);
    for (int64_t g = 0; g < lists; g++) {
      const int32_t *list = groups.input + groups.starts[g], *stop = groups.input + groups.starts[g + 1];
      const int64_t until = lower_bound(list, stop, last) - groups.input;
      for (int64_t o = g * G; o < min(O, (g + 1) * G); o += kLanes) {
        if (O - o < kLanes) std::memset((void*)grad, 0, size_t(kLanes * kGroupSamples) * sizeof(A)); // beyond O
        to_samples<kGroupSamples>(grad_y + s * O + o, O, rows, min(kLanes, O - o), grad);
        for (int64_t e = lower_bound(list, stop, first) - groups.input; e < until; e += kListPart) {
          const int64_t count = min(kListPart, until - e);
          if constexpr (std::is_same_v<T, bf16>)
            if (has_pairs()) {
              gather_blocks(weight + (o - g * G), G, groups.source + e, count, O - o, (bf16*)blocks);
              const auto add = rows > kLanes ? add_gradient_pairs<2> : add_gradient_pairs<1>;
              add(grad, (bf16*)blocks, groups.input + e, count, sums - first * kGroupSamples);
              continue;
            }
          copy_blocks(weight + (o - g * G), G, groups.source + e, count, O - o, blocks);
          for_registers<A>(rows, [&]<int kRegs>(int64_t r, int64_t k) {
            add_gradients<kRegs>(grad + k * kGroupSamples + r, blocks + k, groups.input + e, count,
                                 sums + r - first * kGroupSamples);
          });
        }
      }
    }
    from_samples<kGroupSamples>(sums, rows, columns, grad_x + s * I + first, I, at_nonzeros ? x + s * I + first : nullptr);
  }
}

// Samples whose gradients of sixteen outputs stay in the first-level cache, and elements of x that stay in the second-level one
// while all groups go by, as do, nearly, the sums of so many blocks.
constexpr int64_t kGroupDepth = 128, kGroupElements = 1 << 17, kGroupBlocks = 1 << 15;
#if defined(__AVX512F__)
constexpr int kTogetherBlocks = 8;
#else
constexpr int kTogetherBlocks = 2;
#endif

// sums of kBlocks blocks (kLanes each) += gradients (rows, kLanes) of their outputs times their inputs, whose samples lie
// `step` apart, kGroupSamples at a time.
template <int kBlocks, class A>
SPARSEKERN_INLINE void add_products(const A* samples, int64_t step, const int32_t* input, const A* grad, int64_t rows,
                                    A* sums) {
  constexpr int kRegs = kBlockRegs<A>;
  reg<A> sum[kBlocks][kRegs];
#pragma GCC unroll 16
  for (int e = 0; e < kBlocks; e++)
#pragma GCC unroll 4
    for (int r = 0; r < kRegs; r++) sum[e][r] = load_reg(sums + e * kLanes + r * kRegLanes<A>);
  for (int64_t s = 0; s < rows; s += kGroupSamples, samples += step) {
    const A* x[kBlocks];
#pragma GCC unroll 16
    for (int e = 0; e < kBlocks; e++) x[e] = samples + input[e] * kGroupSamples;
    const int64_t count = min(kGroupSamples, rows - s);
    for (int64_t k = 0; k < count; k++, grad += kLanes) {
      reg<A> g[kRegs];
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; r++) g[r] = load_reg(grad + r * kRegLanes<A>);
#pragma GCC unroll 16
      for (int e = 0; e < kBlocks; e++) {
        const reg<A> a = x[e][k] - reg<A>{};
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; r++) sum[e][r] = fma_reg(a, g[r], sum[e][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < kBlocks; e++)
#pragma GCC unroll 4
    for (int r = 0; r < kRegs; r++) store_reg(sums + e * kLanes + r * kRegLanes<A>, sum[e][r]);
}

// x (B, I) as the weight's gradient reads it: blocks [begin, end) of samples (ceil(B / kGroupSamples), I, kGroupSamples), in
// acc_t<T>, but bfloat16 where that is multiplied in pairs.
template <class T> void group_samples(const T* x, int64_t B, int64_t I, void* samples, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t t = begin; t < end; t++) {
    const int64_t s = t * kGroupSamples, rows = min(kGroupSamples, B - s);
    if (!in_pairs<T>()) {
      to_samples<kGroupSamples>(x + s * I, I, rows, I, (A*)samples + s * I);
      continue;
    }
    if constexpr (std::is_same_v<T, bf16>) {
      float* wide = (float*)scratch(kValues, size_t(kLanes * kGroupSamples) * sizeof(float));
      for (int64_t i = 0; i < I; i += kLanes) {
        to_samples<kGroupSamples>(x + s * I + i, I, rows, min(kLanes, I - i), wide);
        narrow_samples(wide, min(kLanes, I - i), (bf16*)samples + s * I + i * kGroupSamples);
      }
    }
  }
}

// The blocks of groups [first, last) of grad_weight by samples as group_samples() lays them out.
template <class T>
void grad_weight_groups(const LinearSupport& w, const LinearGroups& groups, const T* grad_y, const acc_t<T>* samples,
                        T* grad_weight, int64_t B, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, G = w.group, step = I * kGroupSamples;
  const int64_t inputs = kGroupElements / min(round_up(B, kLanes), kGroupDepth);
  A* grad = (A*)scratch(kTiles, size_t(kGroupDepth * kLanes) * sizeof(A));
  const auto add = [&](int64_t g, int64_t o, int64_t s, int64_t i, int64_t begin, A* sums) { // entries from `begin` on
    const int64_t rows = min(kGroupDepth, B - s);
    if constexpr (std::is_same_v<T, bf16>)
      for (int64_t p = 0; has_pairs() && 2 * p < rows; p++)
        store_pairs((uint32_t*)grad + p * kLanes, grad_y + s * O + o, O, rows, p, O - o);
    for (int64_t k = 0; !in_pairs<T>() && k < rows; k++)
      store(grad + k * kLanes, load_first(grad_y + (s + k) * O + o, O - o));
    const int32_t *list = groups.input + groups.starts[g], *stop = groups.input + groups.starts[g + 1];
    const int64_t until = lower_bound(list, stop, i + inputs) - groups.input;
    const A* at = samples + s / kGroupSamples * step;
    int64_t e = lower_bound(list, stop, i) - groups.input;
    const auto some = [&]<int kBlocks>() {
      A* to = sums + (e - begin) * kLanes;
      if constexpr (std::is_same_v<T, bf16>)
        if (has_pairs()) {
          const bf16* narrow = (const bf16*)samples + (at - samples);
          add_product_pairs<kBlocks>(narrow, step, groups.input + e, (uint32_t*)grad, rows, to);
          e += kBlocks;
          return;
        }
      add_products<kBlocks>(at, step, groups.input + e, grad, rows, to);
      e += kBlocks;
    };
    while (until - e >= kTogetherBlocks) some.template operator()<kTogetherBlocks>();
    if (kTogetherBlocks > 4 && until - e >= 4) some.template operator()<min(kTogetherBlocks, 4)>();
    if (kTogetherBlocks > 2 && until - e >= 2) some.template operator()<2>();
    if (until > e) some.template operator()<1>();
  };
  while (first < last) {
    const int64_t begin = groups.starts[first];
    int64_t stop = first + 1; // of the groups whose sums are kept together
    while (B > kGroupDepth && stop < last && groups.starts[stop + 1] - begin <= kGroupBlocks) stop++;
    const size_t bytes = size_t((groups.starts[stop] - begin) * kLanes) * sizeof(A);
    A* sums = (A*)scratch(kSums, bytes);
    for (int64_t v = 0; v < G; v += kLanes) { // of a group's outputs
      if (bytes > 0) std::memset((void*)sums, 0, bytes); // groups without weights may have no memory
      for (int64_t s = 0; s < B; s += kGroupDepth)
        for (int64_t i = 0; i < I; i += inputs)
          for (int64_t g = first; g < stop && g * G + v < O; g++) add(g, g * G + v, s, i, begin, sums);
      const vec<A> zeros{};
      for (int64_t g = first; g < stop; g++)
        for (int64_t e = groups.starts[g]; e < groups.starts[g + 1]; e++) { // lanes beyond O stay zero, whatever x is
          const int64_t outputs = O - g * G - v;
          T* to = grad_weight + groups.source[e] * G + v;
          if (outputs < kLanes) store(to, zeros);
          if (outputs > 0) store_first(to, load(sums + (e - begin) * kLanes), outputs);
        }
    }
    first = stop;
  }
}

} // namespace
} // namespace sparsekern
