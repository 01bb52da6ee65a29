// The forward pass with one sample in each lane, as in sparse_linear_lanes.h, by a plan of the support: a part of the
// inputs stays in the first-level cache, and outputs by rising number of weights let branches be foreseen.
#pragma once
#include "sparse_linear_lanes.h"

namespace sparsekern {
namespace {

// sums (kPlanOutputs, kSampleLanes) += the weights of one part of inputs and outputs times samples (kPlanInputs,
// kSampleLanes).
template <int kRegs, class A>
void add_cell(const LinearPlan& plan, int64_t cell, const A* weight, const A* samples, A* sums) {
  const int32_t last = plan.cells[cell + 1];
  for (int32_t e = plan.cells[cell]; e < last; e++) {
    A* to = sums + plan.output[e] * kSampleLanes<A>;
    reg<A> sum[kRegs];
#pragma GCC unroll 8
    for (int r = 0; r < kRegs; r++) sum[r] = load_reg(to + r * kRegLanes<A>);
    const int32_t stop = plan.starts[e + 1];
    for (int32_t k = plan.starts[e]; k < stop; k++) {
      const reg<A> a = weight[k] - reg<A>{};
      const A* row = samples + plan.input[k] * kSampleLanes<A>;
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; r++) sum[r] = fma_reg(a, load_reg(row + r * kRegLanes<A>), sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRegs; r++) store_reg(to + r * kRegLanes<A>, sum[r]);
  }
}

// By as few vectors of sixteen samples as the rows need.
template <class A>
void add_cell(const LinearPlan& plan, int64_t cell, const A* weight, int64_t rows, const A* samples, A* sums) {
  constexpr int kRegs = kLanes / kRegLanes<A>, kMost = int(kSampleLanes<A> / kLanes);
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
  if (vectors >= 4) add_cell<kRegs * min(4, kMost)>(plan, cell, weight, samples, sums);
  else if (vectors == 3) add_cell<kRegs * min(3, kMost)>(plan, cell, weight, samples, sums);
  else if (vectors == 2) add_cell<kRegs * min(2, kMost)>(plan, cell, weight, samples, sums);
  else add_cell<kRegs>(plan, cell, weight, samples, sums);
}

// Outputs [first, last), where first is a multiple of kPlanOutputs, of x W^T + bias for rows [begin, end).
template <class T>
void forward_lanes(const LinearPlan& plan, const T* x, const acc_t<T>* weight, const T* bias, T* y, int64_t begin,
                   int64_t end, int64_t first, int64_t last) {
  using A = acc_t<T>;
  constexpr int64_t kStep = kSampleLanes<A>;
  const int64_t I = plan.inputs, O = plan.outputs, parts = (I + kPlanInputs - 1) / kPlanInputs;
  A* samples = (A*)scratch(kTiles, size_t(I * kStep) * sizeof(A));
  A* sums = (A*)scratch(kSums, size_t(kPlanOutputs * kStep) * sizeof(A));
  for (int64_t s = begin; s < end; s += kStep) {
    const int64_t rows = min(kStep, end - s);
    to_samples<kStep>(x + s * I, I, rows, I, samples);
    for (int64_t o = first; o < last; o += kPlanOutputs) {
      const int64_t columns = min(kPlanOutputs, last - o);
      for (int64_t c = 0; c < columns; c++) {
        const vec<A> start = splat(bias ? to_acc(bias[o + c]) : A(0));
        for (int64_t r = 0; r < kStep; r += kLanes) store(sums + c * kStep + r, start);
      }
      for (int64_t p = 0; p < parts; p++)
        add_cell(plan, o / kPlanOutputs * parts + p, weight, rows, samples + p * kPlanInputs * kStep, sums);
      from_samples<kStep>(sums, rows, columns, y + s * O + o, O);
    }
  }
}

} // namespace
} // namespace sparsekern
