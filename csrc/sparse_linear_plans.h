// The lists that Python prepares of a support: see sparsekern/ops/sparse_linear.py.
#pragma once
#include "sparse_linear.h"
#include "tensor.h"

namespace sparsekern {

// What plan_support() made, or a plan of nothing where it does not fit.
inline LinearPlan plan_of(const LinearSupport& w, int64_t weights, const std::optional<Tensor>& lists) {
  LinearPlan plan{w.inputs, w.outputs};
  if (w.group != 1 || !lists || lists->scalar_type() != ScalarType::Int) return plan;
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t cells = parts(w.outputs, kPlanOutputs) * parts(w.inputs, kPlanInputs);
  if (lists->numel() <= cells) return plan;
  plan.cells = (const int32_t*)lists->const_data_ptr();
  plan.starts = plan.cells + cells + 1;
  const int64_t entries = plan.cells[cells];
  plan.output = plan.starts + entries + 1;
  plan.input = plan.output + entries;
  plan.source = plan.input + weights;
  STD_TORCH_CHECK(lists->numel() == cells + 1 + 2 * entries + 1 + 2 * weights,
                  "sparse_linear: wants the support_plan of this support");
  return plan;
}

// What plan_groups() made, or nothing.
inline LinearGroups groups_of(const LinearSupport& w, int64_t blocks, const std::optional<Tensor>& lists) {
  if (w.group % 16 != 0 || !lists || lists->scalar_type() != ScalarType::Int) return {};
  const int64_t groups = (w.outputs + w.group - 1) / w.group;
  STD_TORCH_CHECK(lists->numel() == groups + 1 + 2 * blocks, "sparse_linear: wants the support_plan of this support");
  const auto* starts = (const int32_t*)lists->const_data_ptr();
  return {starts, starts + groups + 1, starts + groups + 1 + blocks};
}

} // namespace sparsekern
