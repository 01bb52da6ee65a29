// What the registrations share: checks and views of stable-ABI tensors. Never included by kernel files.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
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

// (B, C, H, W) of like's dtype, contiguous or channels-last.
inline Tensor empty_maps(const Tensor& like, std::array<int64_t, 4> shape, bool channels_last) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

} // namespace sparsekern
