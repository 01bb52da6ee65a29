// What the registrations share: checks and views of stable-ABI tensors. Never included by kernel files.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>

#include "isa.h"

namespace sparsekern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, op, ": wants float32, float64, bfloat16 or float16, got ",
                             torch::headeronly::toString(t.scalar_type()));
  }
}

// A call through the dispatcher costs more than a look.
inline Tensor unstrided(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Uninitialised, on the CPU. By the C function: PyTorch's C++ ones look their op up by name at every call, which takes
// 0.8 us more, as long as a small layer's sums.
template <size_t N>
Tensor empty_strided(ScalarType dtype, const int64_t (&shape)[N], const int64_t (&strides)[N]) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The same, contiguous.
template <size_t N> Tensor empty(ScalarType dtype, const int64_t (&shape)[N]) {
  int64_t strides[N], stride = 1;
  for (size_t d = N; d-- > 0; stride *= shape[d] > 1 ? shape[d] : 1) strides[d] = stride;
  return empty_strided(dtype, shape, strides);
}

template <size_t N> Tensor zeros(ScalarType dtype, const int64_t (&shape)[N]) {
  Tensor t = empty(dtype, shape);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());
  return t;
}

// (B, C, H, W) of like's dtype, contiguous or channels-last.
inline Tensor empty_maps(const Tensor& like, const int64_t (&shape)[4], bool channels_last) {
  if (!channels_last) return empty(like.scalar_type(), shape);
  const auto size = [&](int d) { return shape[d] > 1 ? shape[d] : 1; };
  return empty_strided(like.scalar_type(), shape,
                       {size(1) * size(2) * size(3), 1, size(3) * size(1), size(1)});
}

} // namespace sparsekern
