// The gradient of a bias, the sum of grad_y over all but its channels: what the kernels of one instruction set offer.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sparsekern {

// Sums are taken in the accumulator type (float; double for double) of parts whose bounds no number of threads decides.
struct GradBiasKernels {
  int (*accumulator_bytes)(DType dtype);
  // sums[o] = sum of rows r < n of grad_y (n, O), for channels first..last.
  void (*rows)(DType dtype, const void* grad_y, int64_t n, int64_t O, void* sums, int64_t first, int64_t last);
  // sums[i] = sum of the n neighbouring elements of row i of grad_y (rows, n), for rows begin..end.
  void (*neighbours)(DType dtype, const void* grad_y, int64_t n, void* sums, int64_t begin, int64_t end);
  // grad_bias[o] = sum of the parts' sums (parts, O), in order, for channels first..last.
  void (*finish)(DType dtype, const void* sums, int64_t parts, int64_t O, void* grad_bias, int64_t first, int64_t last);
};

extern const GradBiasKernels grad_bias_baseline, grad_bias_avx2, grad_bias_avx512;

} // namespace sparsekern
