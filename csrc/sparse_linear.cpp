#include "sparse_linear.h"

#include "grad_bias_calls.h"
#include "parallel.h"
#include "sparse_linear_dense.h"
#include "sparse_linear_plans.h"
#include "sparse_linear_ways.h"
#include "tensor.h"

namespace sparsekern {
namespace {

const SparseLinearKernels& kernels() { return SPARSEKERN_SELECT(sparse_linear); }

// Python has checked what users pass; these keep a wrong call of the bare op from reading beyond a tensor.
void check(const char* op, const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.dim() == 2 && other.dim() == 2, op, ": wants matrices, got ", x.dim(), " and ", other.dim(),
                  " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), op, ": wants one dtype, got ",
                  torch::headeronly::toString(x.scalar_type()), " and ",
                  torch::headeronly::toString(other.scalar_type()));
}

LinearSupport support(const Tensor& ccol_indices, const Tensor& row_indices, int64_t outputs, int64_t group,
                      const std::optional<Tensor>& bits = {}) {
  STD_TORCH_CHECK(ccol_indices.scalar_type() == ScalarType::Int && row_indices.scalar_type() == ScalarType::Int &&
                      ccol_indices.size(0) > 0,
                  "sparse_linear: wants ccol_indices (I + 1,) and row_indices (blocks,) in int32");
  const int64_t inputs = ccol_indices.size(0) - 1;
  const auto* ccol = (const int32_t*)ccol_indices.const_data_ptr();
  STD_TORCH_CHECK(ccol[0] == 0 && ccol[inputs] == row_indices.size(0),
                  "sparse_linear: wants ccol_indices ascending from 0 to the number of blocks");
  return {inputs, outputs, group, ccol, (const int32_t*)row_indices.const_data_ptr(),
          // What a module made on a GPU and moved here would be of int32.
          bits && bits->scalar_type() == ScalarType::Long ? (const uint64_t*)bits->const_data_ptr() : nullptr};
}

bool has_pairs(DType dtype) { return dtype == DType::bf16 && kernels().pairs(); }

// A thread is worth waking for about this many multiply-adds.
int64_t grain(int64_t items, int64_t products) {
  constexpr int64_t kProducts = 1 << 16;
  return products <= kProducts ? items : items * kProducts / products + 1;
}

// Calls body(begin, end, first, last) for blocks of rows and ranges of columns whose sums fit the second-level cache.
// How the work is split does not change a sum.
template <class Body> void for_blocks(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kRows = 256, kSums = 1 << 17, kColumns = 1024;
  if (rows == 0 || columns == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t row_blocks = blocks(rows, kRows), row_step = blocks(rows, row_blocks);
  int64_t step = kSums / row_step < kColumns ? kSums / row_step : kColumns;
  int64_t ranges = blocks(columns, step);
  ranges = blocks(blocks(row_blocks * ranges, threads) * threads, row_blocks); // as much for each thread
  step = blocks(blocks(columns, ranges), kLinearPanel) * kLinearPanel;
  ranges = blocks(columns, step);
  torch::stable::parallel_for(0, row_blocks * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t row = t / ranges * row_step, column = t % ranges * step;
      body(row, row + row_step < rows ? row + row_step : rows, column, column + step < columns ? column + step : columns);
    }
  });
}

// Groups may come with the support of their single outputs, whose weights are stored in the same order.
int64_t stored_group(const Tensor& weight, const Tensor& row_indices) {
  return weight.size(0) == row_indices.size(0) ? weight.size(1) : 1;
}

// About the fraction of t that is not zero, by stretches of it that depend on its size alone. Multiples of the golden ratio
// spread them evenly, whatever the length of the rows.
double estimate_active(DType dtype, const Tensor& t) {
  constexpr int64_t kStretches = 32, kStretch = 128;
  const int64_t n = t.numel();
  if (n == 0) return 0;
  if (n <= kStretches * kStretch) return double(kernels().count(dtype, t.const_data_ptr(), n)) / double(n);
  int64_t count = 0;
  double at = 0;
  for (int64_t s = 0; s < kStretches; s++) {
    const int64_t first = int64_t(at * double(n - kStretch));
    count += kernels().count(dtype, (const char*)t.const_data_ptr() + first * int64_t(t.element_size()), kStretch);
    at += 0.6180339887498949;
    if (at >= 1) at -= 1;
  }
  return double(count) / double(kStretches * kStretch);
}

// All weights, which as they are stored are a dense (I, O) matrix.
MatrixView full_weight(const LinearWork& work, const Tensor& weight) {
  const LinearSupport& w = work.support;
  const int64_t stride = (w.outputs + w.group - 1) / w.group * w.group;
  return {(char*)const_cast<void*>(weight.const_data_ptr()), weight.scalar_type(), int64_t(weight.element_size()),
          w.inputs, w.outputs, stride, 1};
}

// Memory of the calling thread for a dense matrix, which keeps its pages: fresh ones would cost as much as what is written.
MatrixView dense_part(const Tensor& like, int64_t rows, int64_t columns) {
  constexpr int kSlot = 8; // the kernels use those below
  const int64_t size = int64_t(like.element_size());
  return {(char*)scratch(kSlot, size_t(rows * columns * size)), like.scalar_type(), size, rows, columns, columns, 1};
}

// The weights of inputs [begin, end) and outputs [first, last), laid out by all threads that there are.
MatrixView expanded(const LinearWork& work, const Tensor& weight, int64_t begin, int64_t end, int64_t first,
                    int64_t last) {
  const MatrixView dense = dense_part(weight, end - begin, last - first);
  torch::stable::parallel_for(begin, end, 64, [&](int64_t from, int64_t to) {
    kernels().expand(work.dtype, work.support, weight.const_data_ptr(),
                     dense.data + (from - begin) * dense.row_stride * dense.size, from, to, first, last);
  });
  return dense;
}

// x W^T + bias for a weight (I, O), in parts of the outputs. Each takes a part of the inputs after the other, but where
// adding them up would round them to two bytes.
Tensor dense_linear(const LinearWork& work, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const LinearSupport& w = work.support;
  const Tensor y = empty(x.scalar_type(), {work.B, w.outputs});
  const MatrixView out = MatrixView::of(y), rows = MatrixView::of(x);
  const Addend start{bias ? bias->const_data_ptr() : nullptr};
  if (work.full()) return multiply(out, rows, full_weight(work, weight), start), y;
  const bool at_once = is_half(out.dtype);
  const int64_t step = part_length(out.dtype, w.outputs, work.B * w.inputs, at_once ? w.inputs * out.size : 0, 64);
  const int64_t fitting = part_room(out.dtype) / (step * out.size) / 64 * 64;
  const int64_t depth = at_once ? w.inputs : fitting < 64 ? 64 : fitting;
  for_parts(w.outputs, step, [&](int64_t first, int64_t last) {
    Addend addend = start.from_column(first, out.size);
    for (int64_t i = 0; i < w.inputs; i += depth, addend.result = true) {
      const int64_t until = i + depth < w.inputs ? i + depth : w.inputs;
      multiply_part(out.column_range(first, last), rows.column_range(i, until),
                    expanded(work, weight, i, until, first, last), addend);
    }
  });
  return y;
}

// In parts of the inputs.
Tensor dense_grad_input(const LinearWork& work, const Tensor& grad_y, const Tensor& x, const Tensor& weight) {
  const LinearSupport& w = work.support;
  Tensor grad_x = empty(x.scalar_type(), {work.B, w.inputs});
  const MatrixView out = MatrixView::of(grad_x), rows = MatrixView::of(grad_y);
  if (work.full()) multiply(out, rows, full_weight(work, weight).transposed());
  else
    for_parts(w.inputs, part_length(out.dtype, w.inputs, work.B * w.outputs, w.outputs * out.size),
              [&](int64_t first, int64_t last) {
                multiply_part(out.column_range(first, last), rows,
                              expanded(work, weight, first, last, 0, w.outputs).transposed());
              });
  if (work.at_nonzeros) {
    const int64_t size = int64_t(x.element_size());
    torch::stable::parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      kernels().clear_at_zeros(work.dtype, (const char*)x.const_data_ptr() + begin * size,
                               (char*)grad_x.mutable_data_ptr() + begin * size, end - begin);
    });
  }
  return grad_x;
}

// In parts of the inputs.
void dense_grad_weight(const LinearWork& work, const Tensor& grad_y, const Tensor& x, Tensor& grad_weight) {
  const LinearSupport& w = work.support;
  const MatrixView a = MatrixView::of(x).transposed(), b = MatrixView::of(grad_y);
  if (work.full() && w.outputs % w.group == 0) // stored it is the dense matrix
    return multiply(full_weight(work, grad_weight), a, b);
  const int64_t step = part_length(b.dtype, w.inputs, work.B * w.outputs, w.outputs * b.size);
  for_parts(w.inputs, step, [&](int64_t first, int64_t last) {
    const MatrixView dense = dense_part(grad_weight, last - first, w.outputs);
    multiply_part(dense, a.row_range(first, last), b);
    torch::stable::parallel_for(first, last, 64, [&](int64_t from, int64_t to) {
      kernels().collect(work.dtype, w, dense.data + (from - first) * dense.row_stride * dense.size,
                        grad_weight.mutable_data_ptr(), from, to);
    });
  });
}

// Calls body(begin, end, first, last) for blocks of rows and, where these are few and not as many for each thread, parts of n
// columns: each part transposes its rows again.
template <class Body> void for_samples(int64_t rows, int64_t n, const Body& body) {
  constexpr int64_t kRows = kLinearGroupSamples;
  const int64_t blocks = (rows + kRows - 1) / kRows, threads = torch::stable::get_num_threads();
  if (blocks == 0) return;
  const int64_t parts = blocks % threads == 0 ? 1 : std::min(threads, (4 * threads + blocks - 1) / blocks);
  const int64_t step = (n + parts - 1) / parts;
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const int64_t begin = t / parts * kRows, first = t % parts * step;
      if (first < n)
        body(begin, begin + kRows < rows ? begin + kRows : rows, first, first + step < n ? first + step : n);
    }
  });
}

// By the plan of the support. Few rows are split by their outputs too, which changes no sum.
void forward_by_plan(const LinearWork& work, const LinearPlan& plan, const Tensor& x, const Tensor& weight,
                     const std::optional<Tensor>& bias, Tensor& y) {
  void* ordered = scratch(7, size_t(work.blocks) * sizeof(double));
  torch::stable::parallel_for(0, work.blocks, 1 << 16, [&](int64_t begin, int64_t end) {
    kernels().order_weights(work.dtype, plan, weight.const_data_ptr(), ordered, begin, end);
  });
  constexpr int64_t kRows = 64;
  const int64_t O = plan.outputs, blocks = (work.B + kRows - 1) / kRows;
  const int64_t step = blocks % torch::stable::get_num_threads() == 0 ? O : kPlanOutputs;
  const int64_t parts = (O + step - 1) / step;
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const int64_t begin = t / parts * kRows, first = t % parts * step;
      kernels().forward_lanes(work.dtype, plan, x.const_data_ptr(), ordered, bias ? bias->const_data_ptr() : nullptr,
                              y.mutable_data_ptr(), begin, begin + kRows < work.B ? begin + kRows : work.B, first,
                              first + step < O ? first + step : O);
    }
  });
}

Tensor sparse_linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                     const Tensor& ccol_indices_, const Tensor& row_indices_, int64_t out_features,
                     const std::optional<Tensor>& support_bits, const std::optional<Tensor>& support_plan) {
  const DType dtype = dtype_of("sparse_linear", x_);
  check("sparse_linear", x_, weight_);
  const Tensor x = unstrided(x_), weight = unstrided(weight_);
  const Tensor ccol = unstrided(ccol_indices_), rows = unstrided(row_indices_);
  std::optional<Tensor> bias;
  if (bias_) STD_TORCH_CHECK(bias_->scalar_type() == x_.scalar_type(), "sparse_linear: wants bias in the dtype of x");
  if (bias_) bias = unstrided(*bias_);
  const int64_t group = stored_group(weight, rows);
  STD_TORCH_CHECK(x.size(1) == ccol.size(0) - 1 && weight.numel() == rows.size(0) * group && group > 0 &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == out_features)),
                  "sparse_linear: wants x (B, I), weight (blocks, group_size), bias (O,), ccol_indices (I + 1,) and "
                  "row_indices (blocks,)");
  const int64_t B = x.size(0);
  const LinearSupport w = support(ccol, rows, out_features, group, support_bits);
  const LinearPlan plan = plan_of(w, rows.size(0), support_plan);
  const LinearGroups groups = groups_of(w, rows.size(0), support_plan);
  LinearWork work{Pass::forward, dtype, B, w, rows.size(0), plan.cells || groups.starts, has_pairs(dtype)};
  work.rows_active = work.panels_active = estimate_active(dtype, x);
  const Way way = fastest_way(work).way;
  if (way == Way::dense) return dense_linear(work, x, weight, bias);
  Tensor y = empty(x.scalar_type(), {B, out_features});
  if (way == Way::lanes) {
    forward_by_plan(work, plan, x, weight, bias, y);
    return y;
  }
  if (way == Way::groups) {
    for_samples(B, (out_features + group - 1) / group, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().forward_groups(dtype, w, groups, x.const_data_ptr(), weight.const_data_ptr(),
                               bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), begin, end, first, last);
    });
    return y;
  }
  if (way == Way::pairs) {
    for_blocks(B, out_features, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().forward_pairs(w, x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                              y.mutable_data_ptr(), begin, end, first, last);
    });
    return y;
  }
  if (way == Way::panels || way == Way::tiles) {
    for_blocks(B, out_features, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().forward_panels(dtype, w, x.const_data_ptr(), weight.const_data_ptr(),
                               bias ? bias->const_data_ptr() : nullptr, way == Way::tiles, y.mutable_data_ptr(), begin, end,
                               first, last);
    });
    return y;
  }
  parallel_items(B, grain(B, B * weight.numel() / 8), [&](int64_t begin, int64_t end) {
    kernels().forward(dtype, w, x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                      y.mutable_data_ptr(), begin, end);
  });
  return y;
}

Tensor grad_input(const LinearWork& work, const LinearGroups& groups, const Tensor& grad_y, const Tensor& x,
                  const Tensor& weight) {
  const Way way = fastest_way(work).way;
  if (way == Way::dense) return dense_grad_input(work, grad_y, x, weight);
  const LinearSupport& w = work.support;
  const int64_t B = work.B;
  Tensor grad_x = empty(x.scalar_type(), {B, w.inputs});
  if (way == Way::groups) {
    for_samples(B, w.inputs, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().grad_input_groups(work.dtype, w, groups, grad_y.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                  grad_x.mutable_data_ptr(), work.at_nonzeros, begin, end, first, last);
    });
    return grad_x;
  }
  if (way == Way::pairs) {
    for_blocks(B, w.inputs, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().grad_input_pairs(w, grad_y.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                 grad_x.mutable_data_ptr(), work.at_nonzeros, begin, end, first, last);
    });
    return grad_x;
  }
  if (way == Way::panels || way == Way::tiles) {
    for_blocks(B, w.inputs, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().grad_input_panels(work.dtype, w, grad_y.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                  grad_x.mutable_data_ptr(), work.at_nonzeros, way == Way::tiles, begin, end, first, last);
    });
    return grad_x;
  }
  parallel_items(B, grain(B, B * weight.numel() / 8), [&](int64_t begin, int64_t end) {
    kernels().grad_input(work.dtype, w, grad_y.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                         grad_x.mutable_data_ptr(), work.at_nonzeros, begin, end);
  });
  return grad_x;
}

// grad_y as tiles, in memory of the calling thread.
const void* tiles_of(const LinearWork& work, const Tensor& grad_y) {
  const int64_t O = work.support.outputs;
  void* memory = scratch(7, kernels().tiles_bytes(work.dtype, work.B, O));
  torch::stable::parallel_for(0, work.B, grain(work.B, 4 * work.B * O), [&](int64_t begin, int64_t end) {
    kernels().tile_rows(work.dtype, grad_y.const_data_ptr(), O, memory, begin, end);
  });
  return memory;
}

void grad_weight(const LinearWork& work, const LinearGroups& groups, const Tensor& grad_y, const Tensor& x, Tensor& grad) {
  const Way way = fastest_way(work).way;
  if (way == Way::dense) return dense_grad_weight(work, grad_y, x, grad);
  const LinearSupport& w = work.support;
  const int64_t B = work.B, I = w.inputs;
  if (way == Way::groups) {
    const int64_t blocks = (B + kLinearGroupSamples - 1) / kLinearGroupSamples;
    void* samples = scratch(7, size_t(blocks * kLinearGroupSamples * I) * (work.dtype == DType::f64 ? 8 : 4));
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      kernels().group_samples(work.dtype, x.const_data_ptr(), B, I, samples, begin, end);
    });
    parallel_stretches((w.outputs + w.group - 1) / w.group, 4, [&](int64_t begin, int64_t end) {
      kernels().grad_weight_groups(work.dtype, w, groups, grad_y.const_data_ptr(), samples, grad.mutable_data_ptr(), B, begin,
                                   end);
    });
    return;
  }
  if (way == Way::pairs) {
    const int64_t outputs = (w.outputs + w.group - 1) / w.group * w.group;
    const int64_t panels = (outputs + kLinearPanel - 1) / kLinearPanel;
    void* tiles = scratch(7, size_t(panels * ((B + 1) / 2) * kLinearPanel) * 4);
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      kernels().pair_rows(grad_y.const_data_ptr(), B, w.outputs, tiles, begin, end);
    });
    parallel_stretches(I, 96, [&](int64_t begin, int64_t end) {
      kernels().grad_weight_pairs(w, tiles, x.const_data_ptr(), grad.mutable_data_ptr(), B, begin, end);
    });
    return;
  }
  if (way == Way::panels || way == Way::tiles) {
    const void* memory = tiles_of(work, grad_y);
    parallel_stretches(I, 64, [&](int64_t begin, int64_t end) {
      kernels().grad_weight_panels(work.dtype, w, memory, x.const_data_ptr(), way == Way::tiles, grad.mutable_data_ptr(), B,
                                   begin, end);
    });
    return;
  }
  parallel_stretches(I, grain(I, B * grad.numel() / 8), [&](int64_t begin, int64_t end) {
    kernels().grad_weight(work.dtype, w, grad_y.const_data_ptr(), x.const_data_ptr(), grad.mutable_data_ptr(), B, begin,
                          end);
  });
}

// G a multiple of 16; grad_x at the non-zeros of x.
void both_gradients(const LinearWork& work, const Tensor& grad_y, const Tensor& x, const Tensor& weight, Tensor& grad_x,
                    Tensor& grad) {
  const int64_t I = work.support.inputs;
  const void* tiles = tiles_of(work, grad_y);
  parallel_stretches(I, grain(I, work.B * grad.numel() / 4), [&](int64_t begin, int64_t end) {
    kernels().both_gradients(work.dtype, work.support, tiles, x.const_data_ptr(), weight.const_data_ptr(),
                             grad_x.mutable_data_ptr(), grad.mutable_data_ptr(), work.B, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> sparse_linear_backward(const Tensor& grad_y_, const Tensor& x_,
                                                          const Tensor& weight_, const Tensor& ccol_indices_,
                                                          const Tensor& row_indices_, bool at_nonzeros, bool want_input,
                                                          bool want_weight, bool want_bias,
                                                          const std::optional<Tensor>& support_bits,
                                                          const std::optional<Tensor>& support_plan) {
  const DType dtype = dtype_of("sparse_linear_backward", x_);
  check("sparse_linear_backward", x_, grad_y_);
  check("sparse_linear_backward", x_, weight_);
  const Tensor grad_y = unstrided(grad_y_), x = unstrided(x_), weight = unstrided(weight_);
  const Tensor ccol = unstrided(ccol_indices_), rows = unstrided(row_indices_);
  const int64_t B = x.size(0), group = stored_group(weight, rows);
  STD_TORCH_CHECK(x.size(1) == ccol.size(0) - 1 && weight.numel() == rows.size(0) * group && group > 0 &&
                      grad_y.size(0) == B,
                  "sparse_linear_backward: wants grad_y (B, O), x (B, I), weight (blocks, group_size), "
                  "ccol_indices (I + 1,) and row_indices (blocks,)");
  const LinearSupport w = support(ccol, rows, grad_y.size(1), group, support_bits);
  const LinearGroups groups = groups_of(w, rows.size(0), support_plan);
  const bool has_groups = groups.starts != nullptr;
  const auto none = [&] { return empty(x.scalar_type(), {0}); };
  const double in_x = want_weight || (want_input && at_nonzeros) ? estimate_active(dtype, x) : 1;
  LinearWork of_input{Pass::grad_input, dtype, B, w, rows.size(0), has_groups, has_pairs(dtype), at_nonzeros};
  if (at_nonzeros) of_input.rows_active = in_x;
  if (want_input && has_panels(of_input)) of_input.panels_active = estimate_active(dtype, grad_y);
  LinearWork of_weight{Pass::grad_weight, dtype, B, w, rows.size(0), has_groups, has_pairs(dtype)};
  of_weight.rows_active = of_weight.panels_active = in_x;
  const bool both = want_input && want_weight && both_pay(of_input, of_weight);
  Tensor grad = want_weight ? empty(x.scalar_type(), {weight.size(0), weight.size(1)}) : none();
  Tensor grad_x = both         ? empty(x.scalar_type(), {B, w.inputs})
                  : want_input ? grad_input(of_input, groups, grad_y, x, weight)
                               : none();
  if (both) both_gradients(of_input, grad_y, x, weight, grad_x, grad);
  else if (want_weight) grad_weight(of_weight, groups, grad_y, x, grad);
  return {grad_x, grad, want_bias ? grad_bias(grad_y) : none()};
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("sparse_linear_backward", TORCH_BOX(&sparse_linear_backward));
}

} // namespace
} // namespace sparsekern
