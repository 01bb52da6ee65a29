// Which way through a sparse linear layer is fastest: by its non-zeros, or by the dense matrix product.
#pragma once
#include "sparse_linear.h"

namespace sparsekern {

enum class Pass { forward, grad_input, grad_weight };

// What a pass has to do: B rows, the stored weights, and how much of the factor whose zeros it skips is not zero.
struct LinearWork {
  Pass pass;
  DType dtype;
  int64_t B;
  const LinearSupport& support;
  int64_t blocks;
  double active;

  double density() const {
    const double I = double(support.inputs), groups = double((support.outputs + support.group - 1) / support.group);
    return I * groups > 0 ? double(blocks) / (I * groups) : 0;
  }
  // All weights exist: as they are stored they are a dense (I, groups * G) matrix.
  bool full() const {
    return blocks == support.inputs * ((support.outputs + support.group - 1) / support.group);
  }
  bool by_panels() const { return support.group % 16 != 0 && B >= 8; }
};

// Costs in cycles for every vector of sixteen outputs of one input, so that I and O cancel out. Measured at 1600 x 1000
// on one Zen 4 core at 3.7 GHz in float32 with AVX-512; instruction sets slow both sides down alike.

inline double dense_cost(const LinearWork& work) {
  const double B = double(work.B);
  // A matrix times a vector waits for memory; PyTorch multiplies bfloat16 by instructions of its own.
  const double dense = work.dtype == DType::bf16 ? 4.5 + 0.55 * B
                       : B < 4                   ? 4.0 * B
                                                 : 7 + 1.2 * B;
  if (work.full()) return dense;
  const double each = work.support.group == 1 ? 25 : 10; // laid out or collected one by one, or by blocks
  return dense + 3 + each * work.density();
}

inline double sparse_cost(const LinearWork& work) {
  const double products = double(work.B) * work.active, d = work.density();
  if (work.by_panels()) {
    const bool bits = work.support.bits != nullptr;
    const double once = work.pass == Pass::grad_weight  ? (bits ? 4 : 3 + 20 * d)
                        : work.pass == Pass::grad_input ? 3 + 30 * d
                                                        : (bits ? 6 : 5 + 32 * d);
    return once + 1.75 * products;
  }
  if (work.support.group % 16 == 0) return 4.5 * d * products;
  if (work.support.bits != nullptr && d > 0.2) return (work.pass == Pass::forward ? 5.5 : 30 * d) * products;
  return 30 * d * products;
}

inline bool dense_pays(const LinearWork& work) { return dense_cost(work) < sparse_cost(work); }

} // namespace sparsekern
