// The dense matrix product in parts that depend on its shape alone, so that its bits do not depend on the number of threads.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensor.h"

namespace sparsekern {

// (rows, columns) of elements of one size, where neighbours of a row are column_stride elements apart.
struct MatrixView {
  char* data;
  ScalarType dtype;
  int64_t size; // bytes of an element
  int64_t rows, columns, row_stride, column_stride;

  static MatrixView of(const Tensor& t) {
    return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), t.scalar_type(), int64_t(t.element_size()),
            t.size(0), t.size(1), t.stride(0), t.stride(1)};
  }
  MatrixView transposed() const { return {data, dtype, size, columns, rows, column_stride, row_stride}; }
  MatrixView row_range(int64_t begin, int64_t end) const {
    return {data + begin * row_stride * size, dtype, size, end - begin, columns, row_stride, column_stride};
  }
  MatrixView column_range(int64_t begin, int64_t end) const {
    return transposed().row_range(begin, end).transposed();
  }
  // Knows nothing of autograd.
  Tensor tensor() const {
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
  }
};

// What a product is added to: nothing, a row for all rows alike (in the result's dtype), or what the result holds.
struct Addend {
  const void* row = nullptr;
  bool result = false;

  Addend from_column(int64_t first, int64_t size) const {
    return {row == nullptr ? nullptr : static_cast<const char*>(row) + first * size, result};
  }
};

// out = a b + addend, one matrix product of PyTorch's, by its C functions: the dispatcher looks an op up by name at each call.
inline void multiply_here(const MatrixView& out, const MatrixView& a, const MatrixView& b, Addend addend) {
  const Tensor y = out.tensor(), left = a.tensor(), right = b.tensor();
  if (!addend.result && addend.row == nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), left.get(), right.get()));
    return;
  }
  const Tensor start = addend.result ? y
                                     : torch::stable::from_blob(
                                           const_cast<void*>(addend.row), {out.columns}, {1},
                                           torch::stable::Device(torch::headeronly::DeviceType::CPU), out.dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), start.get(), left.get(), right.get(), 1, 1));
}

// The same on one thread: within a parallel region PyTorch's products do not split further. An empty second item makes sure
// that there is such a region.
inline void multiply_part(const MatrixView& out, const MatrixView& a, const MatrixView& b, Addend addend = {}) {
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t) {
    if (begin == 0) multiply_here(out, a, b, addend);
  });
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// Bytes of memory that parts use anew: a second-level cache, or what a part in two bytes needs to be worth its cost.
inline int64_t part_room(ScalarType dtype) { return is_half(dtype) ? 4 << 20 : 1 << 20; }

// How many of `length` lines of a product one part does, a multiple of `whole`, by the multiply-adds of a line and the bytes
// that it needs in memory which every part uses anew.
//
// A part costs what calling PyTorch does: 3 us in float32, which multiplies 4e7 numbers in a millisecond on one Zen 4 core,
// and 20 us in bfloat16, which multiplies 1e8 and has one part more than it gains from only where there are several threads'
// worth of work. Memory that stays in the second-level cache is written and read twice as fast.
inline int64_t part_length(ScalarType dtype, int64_t length, int64_t products, int64_t bytes, int64_t whole = 16) {
  const bool half = is_half(dtype);
  const int64_t most = length * products;
  int64_t parts = half ? (most < 1 << 26 ? 1 : most < 1 << 29 ? 2 : most >> 28) : most >> 22;
  if (parts * 256 > length) parts = length / 256; // each part packs the other factor once more
  if (parts > 64) parts = 64;
  const int64_t room = part_room(dtype);
  if (parts * room < bytes * length) parts = (bytes * length + room - 1) / room;
  if (parts < 1) parts = 1;
  while (parts > 1 && (parts & (parts - 1)) != 0) parts++; // as many for each of 2, 4, 8, ... threads
  return ((length + parts - 1) / parts + whole - 1) / whole * whole;
}

// body(first, last) for parts of `step` lines, each on one thread. One part only is not in a parallel region, so that what it
// does beside the product may have all threads.
template <class Body> void for_parts(int64_t length, int64_t step, const Body& body) {
  if (length <= step) return body(int64_t(0), length);
  torch::stable::parallel_for(0, (length + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) body(t * step, t * step + step < length ? t * step + step : length);
  });
}

// out = a b + addend, in parts of rows or columns.
inline void multiply(const MatrixView& out, const MatrixView& a, const MatrixView& b, Addend addend = {}) {
  const bool by_rows = out.rows > out.columns;
  const int64_t length = by_rows ? out.rows : out.columns;
  const int64_t step = part_length(out.dtype, length, a.columns * (by_rows ? out.columns : out.rows), 0);
  for_parts(length, step, [&](int64_t first, int64_t last) {
    if (by_rows) multiply_part(out.row_range(first, last), a.row_range(first, last), b, addend);
    else
      multiply_part(out.column_range(first, last), a, b.column_range(first, last), addend.from_column(first, out.size));
  });
}

} // namespace sparsekern
