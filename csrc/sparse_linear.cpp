#include "sparse_linear.h"

#include "sparse_linear_dense.h"
#include "sparse_linear_ways.h"
#include "tensor.h"

namespace sparsekern {
namespace {

const SparseLinearKernels& kernels() { return SPARSEKERN_SELECT(sparse_linear); }

// A call through the dispatcher costs more than a look.
Tensor unstrided(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

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
  // What a module made on a GPU and moved here would be of int32.
  return {ccol_indices.size(0) - 1, outputs, group, (const int32_t*)ccol_indices.const_data_ptr(),
          (const int32_t*)row_indices.const_data_ptr(),
          bits && bits->scalar_type() == ScalarType::Long ? (const uint64_t*)bits->const_data_ptr() : nullptr};
}

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
  if (row_blocks * ranges % threads != 0) ranges = blocks(row_blocks * ranges, threads) * threads / row_blocks + 1;
  step = blocks(blocks(columns, ranges), kLinearPanel) * kLinearPanel;
  ranges = blocks(columns, step);
  torch::stable::parallel_for(0, row_blocks * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t row = t / ranges * row_step, column = t % ranges * step;
      body(row, row + row_step < rows ? row + row_step : rows, column, column + step < columns ? column + step : columns);
    }
  });
}

// About the fraction of t that is not zero, by stretches of it that depend on its size alone. Multiples of the golden ratio
// spread them evenly, whatever the length of the rows.
double estimate_active(DType dtype, const Tensor& t) {
  constexpr int64_t kStretches = 32, kStretch = 128;
  const int64_t n = t.numel();
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

// Looks at the factors only where their zeros may matter.
Way choose(LinearWork work, const Tensor* rows_factor, const Tensor* panels_factor) {
  if (work.B == 0 || work.blocks == 0) return Way::rows;
  if (rows_factor != nullptr) work.rows_active = estimate_active(work.dtype, *rows_factor);
  if (work.support.group % 16 != 0 && work.B > 1)
    work.panels_active = panels_factor == rows_factor ? work.rows_active : estimate_active(work.dtype, *panels_factor);
  return fastest_way(work);
}

// The weights as a dense (I, O) matrix: themselves where all of them exist.
Tensor dense_weight(const LinearWork& work, const Tensor& weight) {
  const LinearSupport& w = work.support;
  const int64_t stride = (w.outputs + w.group - 1) / w.group * w.group;
  if (work.full())
    return torch::stable::from_blob(const_cast<void*>(weight.const_data_ptr()), {w.inputs, w.outputs}, {stride, 1},
                                    weight.device(), weight.scalar_type());
  Tensor dense = empty(weight.scalar_type(), {w.inputs, w.outputs});
  torch::stable::parallel_for(0, w.inputs, 64, [&](int64_t begin, int64_t end) {
    kernels().expand(work.dtype, w, weight.const_data_ptr(), dense.mutable_data_ptr(), begin, end);
  });
  return dense;
}

// x W^T + bias for a weight (I, O).
Tensor dense_linear(const LinearWork& work, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor y = empty(x.scalar_type(), {work.B, work.support.outputs}), dense = dense_weight(work, weight);
  multiply(MatrixView::of(y), MatrixView::of(x), MatrixView::of(dense), bias ? bias->const_data_ptr() : nullptr);
  return y;
}

Tensor dense_grad_input(const LinearWork& work, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                        bool at_nonzeros) {
  Tensor grad_x = empty(x.scalar_type(), {work.B, work.support.inputs});
  const Tensor dense = dense_weight(work, weight);
  multiply(MatrixView::of(grad_x), MatrixView::of(grad_y), MatrixView::of(dense).transposed(), nullptr);
  if (at_nonzeros) {
    const int64_t size = int64_t(x.element_size());
    torch::stable::parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      kernels().clear_at_zeros(work.dtype, (const char*)x.const_data_ptr() + begin * size,
                               (char*)grad_x.mutable_data_ptr() + begin * size, end - begin);
    });
  }
  return grad_x;
}

void dense_grad_weight(const LinearWork& work, const Tensor& grad_y, const Tensor& x, Tensor& grad_weight) {
  const LinearSupport& w = work.support;
  if (work.full() && w.outputs % w.group == 0) { // stored it is the dense matrix
    const MatrixView out{(char*)grad_weight.mutable_data_ptr(), x.scalar_type(), int64_t(x.element_size()), w.inputs,
                         w.outputs, w.outputs, 1};
    return multiply(out, MatrixView::of(x).transposed(), MatrixView::of(grad_y), nullptr);
  }
  const Tensor dense = empty(x.scalar_type(), {work.support.inputs, work.support.outputs});
  multiply(MatrixView::of(dense), MatrixView::of(x).transposed(), MatrixView::of(grad_y), nullptr);
  torch::stable::parallel_for(0, work.support.inputs, 64, [&](int64_t begin, int64_t end) {
    kernels().collect(work.dtype, work.support, dense.const_data_ptr(), grad_weight.mutable_data_ptr(), begin, end);
  });
}

Tensor sparse_linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                     const Tensor& ccol_indices_, const Tensor& row_indices_, int64_t out_features,
                     const std::optional<Tensor>& support_bits) {
  const DType dtype = dtype_of("sparse_linear", x_);
  check("sparse_linear", x_, weight_);
  const Tensor x = unstrided(x_), weight = unstrided(weight_);
  const Tensor ccol = unstrided(ccol_indices_), rows = unstrided(row_indices_);
  std::optional<Tensor> bias;
  if (bias_) STD_TORCH_CHECK(bias_->scalar_type() == x_.scalar_type(), "sparse_linear: wants bias in the dtype of x");
  if (bias_) bias = unstrided(*bias_);
  STD_TORCH_CHECK(x.size(1) == ccol.size(0) - 1 && weight.size(0) == rows.size(0) && weight.size(1) > 0 &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == out_features)),
                  "sparse_linear: wants x (B, I), weight (blocks, group_size), bias (O,), ccol_indices (I + 1,) and "
                  "row_indices (blocks,)");
  const int64_t B = x.size(0);
  const LinearSupport w = support(ccol, rows, out_features, weight.size(1), support_bits);
  const LinearWork work{Pass::forward, dtype, B, w, rows.size(0)};
  const Way way = choose(work, &x, &x);
  if (way == Way::dense) return dense_linear(work, x, weight, bias);
  Tensor y = empty(x.scalar_type(), {B, out_features});
  if (way == Way::panels) {
    for_blocks(B, out_features, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().forward_panels(dtype, w, x.const_data_ptr(), weight.const_data_ptr(),
                               bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), begin, end, first, last);
    });
    return y;
  }
  torch::stable::parallel_for(0, B, grain(B, B * weight.numel() / 8), [&](int64_t begin, int64_t end) {
    kernels().forward(dtype, w, x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                      y.mutable_data_ptr(), begin, end);
  });
  return y;
}

Tensor sparse_linear_grad_input(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                                const Tensor& ccol_indices_, const Tensor& row_indices_, bool at_nonzeros) {
  const DType dtype = dtype_of("sparse_linear_grad_input", x_);
  check("sparse_linear_grad_input", x_, grad_y_);
  check("sparse_linear_grad_input", x_, weight_);
  const Tensor grad_y = unstrided(grad_y_), x = unstrided(x_);
  const Tensor weight = unstrided(weight_);
  const Tensor ccol = unstrided(ccol_indices_), rows = unstrided(row_indices_);
  const int64_t B = x.size(0);
  const LinearSupport w = support(ccol, rows, grad_y.size(1), weight.size(1));
  const LinearWork work{Pass::grad_input, dtype, B, w, rows.size(0)};
  const Way way = choose(work, at_nonzeros ? &x : nullptr, &grad_y);
  if (way == Way::dense)
    return dense_grad_input(work, grad_y, x, weight, at_nonzeros);
  Tensor grad_x = empty(x.scalar_type(), {B, x.size(1)});
  if (way == Way::panels) {
    for_blocks(B, w.inputs, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      kernels().grad_input_panels(dtype, w, grad_y.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                  grad_x.mutable_data_ptr(), at_nonzeros, begin, end, first, last);
    });
    return grad_x;
  }
  torch::stable::parallel_for(0, B, grain(B, B * weight.numel() / 8), [&](int64_t begin, int64_t end) {
    kernels().grad_input(dtype, w, grad_y.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                         grad_x.mutable_data_ptr(), at_nonzeros, begin, end);
  });
  return grad_x;
}

Tensor sparse_linear_grad_weight(const Tensor& grad_y_, const Tensor& x_, const Tensor& ccol_indices_,
                                 const Tensor& row_indices_, int64_t group_size,
                                 const std::optional<Tensor>& support_bits) {
  const DType dtype = dtype_of("sparse_linear_grad_weight", x_);
  check("sparse_linear_grad_weight", x_, grad_y_);
  const Tensor grad_y = unstrided(grad_y_), x = unstrided(x_);
  const Tensor ccol = unstrided(ccol_indices_), rows = unstrided(row_indices_);
  const int64_t B = x.size(0), I = x.size(1);
  Tensor grad_weight = empty(x.scalar_type(), {rows.size(0), group_size});
  const LinearSupport w = support(ccol, rows, grad_y.size(1), group_size, support_bits);
  const LinearWork work{Pass::grad_weight, dtype, B, w, rows.size(0)};
  const Way way = choose(work, &x, &x);
  if (way == Way::dense) {
    dense_grad_weight(work, grad_y, x, grad_weight);
    return grad_weight;
  }
  if (way == Way::panels) {
    int64_t bytes;
    const int64_t tiles = kernels().tiles(dtype, B, w.outputs, &bytes);
    void* memory = scratch(7, size_t(bytes));
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      kernels().tile_rows(dtype, grad_y.const_data_ptr(), B, w.outputs, memory, begin, end);
    });
    torch::stable::parallel_for(0, I, 64, [&](int64_t begin, int64_t end) {
      kernels().grad_weight_panels(dtype, w, memory, x.const_data_ptr(), grad_weight.mutable_data_ptr(), B, begin, end);
    });
    return grad_weight;
  }
  torch::stable::parallel_for(0, I, grain(I, B * grad_weight.numel() / 8), [&](int64_t begin, int64_t end) {
    kernels().grad_weight(dtype, w, grad_y.const_data_ptr(), x.const_data_ptr(), grad_weight.mutable_data_ptr(), B,
                          begin, end);
  });
  return grad_weight;
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("sparse_linear_grad_input", TORCH_BOX(&sparse_linear_grad_input));
  m.impl("sparse_linear_grad_weight", TORCH_BOX(&sparse_linear_grad_weight));
}

} // namespace
} // namespace sparsekern
