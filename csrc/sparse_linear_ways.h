// Which way through a sparse linear layer is fastest: by its non-zeros one row at a time, by panels of its weights for many
// rows at once, or by the dense matrix product.
#pragma once
#include "sparse_linear.h"

namespace sparsekern {

enum class Pass { forward, grad_input, grad_weight };
enum class Way { rows, panels, dense };

// What a pass has to do: B rows, the stored weights, and how much is not zero of the factor whose zeros each way skips.
struct LinearWork {
  Pass pass;
  DType dtype;
  int64_t B;
  const LinearSupport& support;
  int64_t blocks;
  double rows_active = 1, panels_active = 1;

  double weights() const {
    return double(support.inputs) * double((support.outputs + support.group - 1) / support.group);
  }
  double density() const { return weights() > 0 ? double(blocks) / weights() : 0; }
  // All weights exist: as they are stored they are a dense (I, groups * G) matrix.
  bool full() const { return double(blocks) == weights(); }
};

// Costs in cycles for every vector of sixteen outputs of one input, so that I and O cancel out. Measured at 1600 x 1000
// on one Zen 4 core at 3.7 GHz in float32 with AVX-512.

inline double dense_cost(const LinearWork& work) {
  const double B = double(work.B), d = work.density();
  const double vectors = double(work.support.inputs) * double((work.support.outputs + 15) / 16);
  // A matrix times a vector waits for memory; PyTorch multiplies bfloat16 by instructions of its own.
  double cost = work.dtype == DType::bf16        ? 7 + 0.62 * B
                : B < 4                          ? 0.5 + 4.5 * B
                : work.pass == Pass::grad_weight ? 6 + 1.25 * B
                                                 : 10 + 1.3 * B;
  cost += 15000 / vectors; // of calling PyTorch
  if (work.full()) return cost;
  return cost + 5 + (work.support.group == 1 ? 25 : 16) * d; // laid out or collected
}

inline double rows_cost(const LinearWork& work) {
  const double products = double(work.B) * work.rows_active, d = work.density();
  if (work.support.group % 16 == 0) {
    const double rounding = work.dtype == DType::bf16 || work.dtype == DType::f16 ? 48 * d : 8 * d;
    return 4.5 * d * products + (work.pass == Pass::grad_weight ? rounding : 0);
  }
  if (work.support.group > 1) return 48 * d * products;
  if (work.pass == Pass::grad_weight) return 110 * d * products;
  if (work.pass == Pass::grad_input) return (work.support.bits != nullptr && d > 0.125 ? 7 : 48 * d) * products;
  if (work.support.bits != nullptr && d > 0.2) return 7.5 * products;
  return 29 * d * products;
}

inline double panels_cost(const LinearWork& work) {
  const double d = work.density();
  const bool bits = work.support.bits != nullptr;
  const double once = work.pass == Pass::grad_weight  ? (bits ? (work.B <= 80 ? 6 : 11) : 3 + 38 * d)
                      : work.pass == Pass::grad_input ? 3 + 70 * d
                                                      : (bits ? 8 : 5 + 40 * d);
  if (work.pass == Pass::grad_input && work.support.group == 1) { // as in sparse_linear_lanes.h
    const double lanes = 1 + 30 * d + 1.6 * d * double((work.B + 15) / 16 * 16);
    const double dots = (bits ? 4 : 5 + 20 * d) + 2.8 * double(work.B) * work.rows_active;
    const double panels = 3 + 70 * d + 1.85 * double(work.B) * work.panels_active;
    return lanes < dots ? (lanes < panels ? lanes : panels) : (dots < panels ? dots : panels);
  }
  // Two-byte weights are widened one by one on their way into a panel.
  const double widened = work.dtype == DType::bf16 || work.dtype == DType::f16 ? 1.6 : 1;
  return once * widened + 1.85 * double(work.B) * work.panels_active;
}

// How much longer a sparse way takes than with AVX-512, measured on Zen 4. PyTorch's products use AVX-512 wherever the
// processor has it, whatever instruction set this library is told to use; elsewhere they are slower as well.
inline double slowdown(Way way) {
  const bool panels = way == Way::panels;
  if (isa() == Isa::avx512 || (isa() == Isa::avx2 && !isa_supported(Isa::avx512))) return 1;
  if (isa() == Isa::avx2) return panels ? 1.5 : 1.2;
  return panels ? 4 : 2;
}

inline Way fastest_way(const LinearWork& work) {
  if (work.B == 0 || work.blocks == 0) return Way::rows;
  const double rows = rows_cost(work) * slowdown(Way::rows);
  const bool has_panels = work.support.group % 16 != 0 && work.B > 1;
  const double panels = has_panels ? panels_cost(work) * slowdown(Way::panels) : rows;
  if (dense_cost(work) < (panels < rows ? panels : rows)) return Way::dense;
  return panels < rows ? Way::panels : Way::rows;
}

} // namespace sparsekern
