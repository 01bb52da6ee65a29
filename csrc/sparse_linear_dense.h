// The dense matrix product in parts that depend on its shape alone, so that its bits do not depend on the number of threads.
#pragma once
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

// out = a b + bias, one matrix product of PyTorch's on the calling thread.
inline void multiply_part(const MatrixView& out, const MatrixView& a, const MatrixView& b, const void* bias) {
  using torch::stable::detail::from;
  std::optional<Tensor> row;
  if (bias != nullptr)
    row = torch::stable::from_blob(const_cast<void*>(bias), {out.columns}, {1},
                                   torch::stable::Device(torch::headeronly::DeviceType::CPU), out.dtype);
  std::array<StableIValue, 4> stack{from(a.tensor()), from(b.transposed().tensor()), from(row), from(out.tensor())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]); // releases it
}

// out = a b + bias, in parts of rows or columns. Each part is one thread's: within a parallel region PyTorch's products do
// not split further. Where there is one part only, an empty second one makes sure that there is such a region.
inline void multiply(const MatrixView& out, const MatrixView& a, const MatrixView& b, const void* bias) {
  // A product packs the factor that the parts share once for each part: parts this long make that cheap. Calling PyTorch
  // takes 4 us, kProducts multiply-adds at least 10 us.
  constexpr int64_t kLength = 256, kParts = 64, kProducts = 1 << 20;
  const bool by_rows = out.rows > out.columns;
  const int64_t length = by_rows ? out.rows : out.columns;
  int64_t parts = length / kLength < kParts ? length / kLength : kParts;
  const int64_t by_work = a.columns * out.rows * out.columns / kProducts;
  if (by_work < parts) parts = by_work;
  if (parts < 1) parts = 1;
  const int64_t step = ((length + parts - 1) / parts + 15) / 16 * 16;
  parts = (length + step - 1) / step;
  torch::stable::parallel_for(0, parts > 2 ? parts : 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end && t < parts; t++) {
      const int64_t first = t * step, last = first + step < length ? first + step : length;
      if (by_rows) multiply_part(out.row_range(first, last), a.row_range(first, last), b, bias);
      else
        multiply_part(out.column_range(first, last), a, b.column_range(first, last),
                      bias ? static_cast<const char*>(bias) + first * out.size : nullptr);
    }
  });
}

} // namespace sparsekern
