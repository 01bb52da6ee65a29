// Which way through a sparse linear layer is fastest: by its non-zeros one row at a time, by panels of its weights for many
// rows at once, by such tiles whatever is zero, with one sample in each lane, by groups of outputs, by pairs of bfloat16, or by
// the dense matrix product.
#pragma once
#include "sparse_linear.h"

namespace sparsekern {

enum class Pass { forward, grad_input, grad_weight };
enum class Way { rows, panels, tiles, lanes, groups, pairs, dense };

// What a pass has to do: B rows, the stored weights, and how much is not zero of the factor whose zeros each way skips.
struct LinearWork {
  Pass pass;
  DType dtype;
  int64_t B;
  const LinearSupport& support;
  int64_t blocks;
  bool has_plan, has_pairs; // for one sample in each lane or by groups, and by pairs of bfloat16
  bool at_nonzeros = false; // the input's gradient
  double rows_active = 1, panels_active = 1;

  double weights() const {
    return double(support.inputs) * double((support.outputs + support.group - 1) / support.group);
  }
  double density() const { return weights() > 0 ? double(blocks) / weights() : 0; }
  // All weights exist: as they are stored they are a dense (I, groups * G) matrix.
  bool full() const { return double(blocks) == weights(); }
};

// How long bfloat16 products take by PyTorch and by pairs, against Zen 4: Zen 5 takes half, at any B. Tiles (AMX) serve
// PyTorch alone; their rate is an estimate.
inline double bf16_rate(bool dense) { return dense && processor().tiles ? 0.2 : processor().wide ? 0.5 : 1; }

inline bool two_bytes(const LinearWork& work) { return work.dtype == DType::bf16 || work.dtype == DType::f16; }

// Costs in float64: once, for the density, for each row and each look at an input of a row (over the vectors of outputs), and
// for a product, with and without the density. Units as below. Fitted on Zen 5 with AVX-512 at 1024 x 256, 784 x 128 and
// 512 x 2048 (densities 0.05 to 1, G = 1, 4 and 16), B = 1 to 256: within a fifth.
struct DoubleCost {
  double once, density, row, look, product, weight;
};
// By pass, for weights one by one and blocks of sixteen.
constexpr DoubleCost kDoubleRows[3][2]{{{0, 2, 0, 6.5, 0.8, 31.5}, {0, 2, 0, 4.9, 0.6, 7.6}},
                                       {{0, 0, 0, 6, 0.5, 35}, {0, 0, 0, 10, 0.5, 7.4}},
                                       {{0, 32, 0, 6.3, 1.3, 102}, {0, 31, 0, 4.1, 0.4, 4.4}}};
constexpr DoubleCost kDoublePanels[3][2]{{{13, 21, 0.47, 0, 1.82, 0}, {13.7, 8, 0.39, 0, 1.87, 0}},
                                         {{3.4, 68, 0.7, 0, 0.14, 0}, {11.7, 53, 0.54, 0, 1.8, 0}},
                                         {{9.3, 50, 0.35, 0, 2.15, 0}, {}}};

inline double double_cost(const LinearWork& work, const DoubleCost (&costs)[3][2], double active) {
  const DoubleCost& cost = costs[int(work.pass)][work.support.group % 16 == 0];
  const double B = double(work.B), vectors = double((work.support.outputs + 15) / 16), d = work.density();
  return cost.once + cost.density * d + cost.row * B + cost.look * B / vectors + (cost.product + cost.weight * d) * active * B;
}

inline double double_dense_cost(const LinearWork& work) {
  const double once = work.pass == Pass::grad_weight ? 12 : 24;
  const double laid_out = work.full() ? 9 : once + (work.support.group % 16 == 0 ? 6 : 22) * work.density();
  return laid_out + 3 * double(work.B);
}

// Whether the kernels multiply 512 bits at once. Costs of such processors are Zen 5's, and stand where they are far from
// Zen 4's: 1600 x 1000 (density 0.4, G = 1 and 16), 1600 x 1500 (0.1), 1024 x 700 (0.05 and 0.3) and 784 x 128 (0.4), 0.05
// to 0.8 active, B = 16 to 256. Rows, and panels without a bitmap, were measured there with all other ways at 1600 x 1500,
// 1024 x 256, 784 x 128, 512 x 2048 and 128 x 1024, densities 0.05 to 1, G = 1, 4 and 16, 0.02 to 1 active, B = 1 to 256,
// float32 and bfloat16: the ways that all these costs lead to take 1.4 % and 1.8 % more than the best in the mean (with G = 16
// alone, and by groups too, 1.7 % and 2.1 %). Zen 4's were measured again all ways at these layers, 1600 x 1000 and 64 x 64
// (2,800 passes): 1.3 % more than the best in the mean, 0.8 % on 500 passes that they were not fitted to.
inline bool wide() { return isa() == Isa::avx512 && processor().wide; }
// In float32: half precision is widened on the way, and two panels of float64 do not fit the registers.
inline bool wide_f32(const LinearWork& work) { return wide() && work.dtype == DType::f32; }

// Costs in cycles for every vector of sixteen outputs of one input, so that I and O cancel out. Measured on one Zen 4 core at
// 3.7 GHz with AVX-512 at 1600 x 1000 (B = 1 to 64, densities 0.05 to 1), for calls and short rows of outputs at 64 x 64,
// 784 x 128 and 1024 x 256.

inline double dense_cost(const LinearWork& work) {
  if (work.dtype == DType::f64) return double_dense_cost(work);
  // Where the processor has no arithmetic of it (with tiles it may), PyTorch takes 2 to 5 times as long in float16 forward and
  // 6 to 60 times backward (Zen 5): its products are never the fastest then, but for single rows forward.
  const bool row = work.B == 1 && work.pass == Pass::forward;
  const double B = double(work.B) * (work.dtype == DType::f16 && !processor().tiles && !row ? 10 : 1), d = work.density();
  const double vectors = double(work.support.inputs) * double((work.support.outputs + 15) / 16);
  const bool forward = work.pass == Pass::forward, weights = work.pass == Pass::grad_weight;
  const bool bf16 = work.dtype == DType::bf16;
  // A matrix times a vector waits for memory; PyTorch multiplies bfloat16 by instructions of its own.
  const double rows = bf16_rate(true) * B; // of bfloat16, on Zen 4
  double cost = bf16 && weights ? 3 + 0.66 * rows
                : bf16          ? 5 + (forward && B > 128 ? 8 + 0.59 * rows : (forward ? 0.65 : 0.61) * rows)
                // The kernels for blocks of sixteen read as fast, and beyond the caches faster.
                : B == 1 && wide() && work.support.group % 16 != 0 ? 3.7
                : B < 4         ? 0.5 + 4.5 * B
                : weights       ? (B < 16 ? 13 : 7) + 1.28 * B
                                : 8 + 1.33 * B;
  cost += (bf16 ? 75000 : 18000) / vectors; // of calling PyTorch: 20 us by way of oneDNN, else 5 us
  if (work.full() && (!weights || work.support.outputs % work.support.group == 0)) // its parts go through all weights
    return bf16 && forward ? cost + 3 : cost;
  if (work.support.bits != nullptr) return cost + 4.5; // laid out or collected
  if (bf16 && work.support.group % 16 == 0) return cost + 4 + 4 * d;
  return cost + 5 + (work.support.group == 1 ? 25 : 16) * d;
}

// Of rows of blocks: for a block, an active input of a row, a look at an input of a row, and once for a block. Of processors
// that multiply 512 bits at once and others, by pass, float32 and two bytes.
struct BlockCost {
  double block, active, look, once;
};
constexpr BlockCost kBlockRows[2][3][2]{{{{5.2, 5, 1.35, 0.1}, {4.9, 7.7, 1.35, 0.2}},
                                         {{4.85, 17, 1.7, 0.2}, {4.4, 25, 1.4, 0.1}},
                                         {{3.5, 4.5, 1.3, 11}, {4.25, 4.5, 1.5, 12}}},
                                        {{{4.4, 2, 0.7, 0}, {3, 3.3, 0.7, 0}},
                                         {{3.1, 10.5, 1, 0}, {2.5, 18.5, 0.95, 0}},
                                         {{2.45, 2.3, 0.83, 8.7}, {2.5, 3.6, 0.8, 6.5}}}};

inline double rows_cost(const LinearWork& work) {
  if (work.dtype == DType::f64) return double_cost(work, kDoubleRows, work.rows_active);
  const double products = double(work.B) * work.rows_active, d = work.density();
  const double vectors = double((work.support.outputs + 15) / 16); // of an input
  const double looks = double(work.B) / vectors;                    // at an input of a row
  if (work.support.group % 16 == 0) {
    const BlockCost& cost = kBlockRows[wide()][int(work.pass)][two_bytes(work)];
    return (cost.block * d + cost.active / vectors) * products + cost.look * looks + cost.once * d;
  }
  const bool bits = work.support.group == 1 && work.support.bits != nullptr;
  if (work.pass == Pass::grad_weight) {
    if (bits && work.B == 1) return 2 + 5 * products;
    if (!wide()) return (two_bytes(work) ? 130 : 115) * d * products + 7 * looks + 6 * d + 0.8;
    return (two_bytes(work) ? 118 : 100) * d * products + 6 * looks + 12 * d + 2;
  }
  if (work.pass == Pass::grad_input) {
    if (!bits || d <= 0.08) return (two_bytes(work) ? 53 : 45) * d * products + 2.5 * looks;
    if (wide_f32(work)) return (work.full() ? 5 : 3.5) * products + 1.5 * looks;
    if (wide()) return 4.6 * products + 4 * looks;
    return (two_bytes(work) ? 5.4 + 14 / vectors : 3.6 + 8 / vectors) * products + 1.2 * looks;
  }
  if (bits && two_bytes(work) && d > 0.125) return 4.5 * products + 2 * looks;
  if (bits && !two_bytes(work) && d > 0.09) return wide_f32(work) ? 2.5 * products : 3.85 * products + 1.4 * looks;
  return (34 * d + 15 / vectors) * products + 2 * looks;
}

// A product of a panel elsewhere, by that of Zen 4.
inline double panel_product(double cycles) { return wide() ? 0.7 * cycles : cycles; }

inline bool has_panels(const LinearWork& work) {
  return work.B > 1 && (work.support.group % 16 != 0 || (work.support.group == 16 && work.pass != Pass::grad_weight));
}
// The input's gradient by panels, lanes or dots: as in sparse_linear_lanes.h. These, and the rows of that pass, were
// measured beside the dense way, whose cost sets the scale, at 1600 x 1000 (density 0.4), 1600 x 1500 (0.1, 0.2),
// 1024 x 700 (0.3) and 784 x 128 (0.4), B = 2 to 256, G = 1 and 16, 0.1 to 1 of grad_y and 0.1 to 0.4 of x active: panels,
// dots and rows are within about a tenth there, but for calls of little work; lanes within a third.
inline bool has_register_tiles(const LinearWork& work) {
  const int64_t G = work.support.group;
  return isa() == Isa::avx512 && work.dtype != DType::f64 && (G == 16 || (G == 1 && work.support.bits != nullptr)) &&
         work.density() > kRegisterTiles;
}
inline double grad_input_panels_cost(const LinearWork& work) {
  const double d = work.density(), B = double(work.B), products = B * work.panels_active;
  const int64_t O = work.support.outputs;
  const double widened = work.support.group != 1 && two_bytes(work) ? 1.6 : 1; // one by one
  const double panels =
      !has_register_tiles(work) ? (3 + 70 * d) * widened + 1.85 * products
      : wide_f32(work)          ? 6 + 0.09 * B + 0.75 * products
                                : (wide() || !two_bytes(work) ? 8.5 : 11) + 0.1 * B + panel_product(1.5) * products;
  if (work.support.group != 1) return panels;
  const double lane = 1.5 + 100 / double(O + 1), vectors = double((O + 15) / 16); // short rows cost more
  const double once = 3 + 35 * d, each = (0.03 + lane * d) * double((work.B + 15) / 16 * 16);
  const double lanes = wide_f32(work) ? 0.85 * once * double((work.B + 63) / 64) + 0.5 * each : once + each;
  const double others = lanes < panels ? lanes : panels;
  if (!work.at_nonzeros) return others;
  const double laid_out = work.support.bits != nullptr ? 4.5 : 5 + 20 * d;
  const double dots = laid_out + (0.06 + 3 / vectors) * B + (2.75 + 7 / vectors) * B * work.rows_active;
  return dots < others ? dots : others;
}
inline double panels_cost(const LinearWork& work) {
  if (work.dtype == DType::f64) return double_cost(work, kDoublePanels, work.panels_active);
  if (work.pass == Pass::grad_input) return grad_input_panels_cost(work);
  const double d = work.density();
  const bool bits = work.support.bits != nullptr;
  const double B = double(work.B), products = B * work.panels_active, vectors = double((work.support.outputs + 15) / 16);
  if (bits && work.pass == Pass::forward) // by B: a row's list
    return wide_f32(work) ? 3 + 0.06 * B + 0.83 * products : 6 + 0.08 * B + panel_product(1.5) * products;
  if (bits && work.pass == Pass::grad_weight)
    return wide_f32(work) ? (work.B <= 80 ? 8.5 : 10 + 0.1 * B) + 0.83 * products
                          : (work.B <= 80 ? 7 : 15) + panel_product(1.6) * products;
  if (work.support.group == 16 && work.pass == Pass::forward) { // 3 us a call, which 64 x 64 must not take
    const double call = 12000 / (double(work.support.inputs) * double((work.support.outputs + 15) / 16));
    return call + (wide_f32(work) ? 4.5 + 0.075 * B + 0.8 * products
                                  : 6 + 8 * d + 0.08 * B + panel_product(1.5) * products);
  }
  const bool weights = work.pass == Pass::grad_weight;
  if (isa() != Isa::avx512) {
    const double once = weights ? 3 + 38 * d : 5 + 40 * d;
    return once * (two_bytes(work) ? 1.6 : 1) + 1.85 * products; // two bytes are widened one by one
  }
  const double once = (weights ? two_bytes(work) ? 8 : 4 : 5) + 40 * d;
  return once + (wide() ? 1 : 1.3) * (0.06 + 0.6 / vectors) * B + panel_product(1.4) * products;
}

// The weight's gradient by all of x copies both its factors, for which more rows would want more memory than they are worth.
inline bool fits(const LinearWork& work) { return work.pass != Pass::grad_weight || work.B <= 4096; }

// By tiles whatever is zero: laid out as for panels, and sums in registers. Measured on Zen 5 at 1600 x 1000, 1600 x 1500,
// 4096 x 1024 and 784 x 128 (G = 1 and 16, densities 0.1 to 0.4), B = 4 to 256, where PyTorch takes 1.35 for what these take
// 0.61, and on Zen 4, where PyTorch takes 1.33 and these 1.2. By AVX2 they are as fast as PyTorch.
inline bool has_tiles(const LinearWork& work) {
  const bool vectors = work.support.bits != nullptr || work.support.group % 16 == 0;
  return work.B > 1 && fits(work) && work.dtype == DType::f32 && isa() == Isa::avx512 && vectors;
}
inline double tiles_cost(const LinearWork& work) {
  const double once = work.pass == Pass::forward       ? (wide() ? 3 : 6.5)
                      : work.pass == Pass::grad_weight ? 14
                      : has_register_tiles(work)       ? 9
                                                       : 5 + 70 * work.density();
  return once + (wide() ? 0.61 : 1.2) * double(work.B);
}

// The forward pass with one sample in each lane, by a plan of the support. Measured at 1600 x 1500, 1024 x 256 and
// 784 x 128 (densities 0.05 to 0.4, B = 32 to 256) with AVX-512 and float32.
inline bool has_lanes(const LinearWork& work) {
  const bool one_by_one = work.has_plan && work.support.group == 1;
  return one_by_one && work.pass == Pass::forward && work.B >= 64 && work.dtype != DType::f64 && isa() == Isa::avx512;
}
inline double lanes_cost(const LinearWork& work) {
  const double d = work.density(), rows = double((work.B + 15) / 16 * 16);
  return (wide_f32(work) ? 0.65 : 1) * (0.5 + 35 * d + (0.04 + 16 / double(work.support.outputs) + 1.65 * d) * rows);
}

// By groups of outputs, whatever is zero: transposing, copying the blocks and multiplying. Fitted, as were the rows of blocks
// above, at 1600 x 1500, 1024 x 256, 784 x 128 and 512 x 2048 (on Zen 4 1600 x 1000, 128 x 1024 and 64 x 64 too), densities
// 0.05 to 1, 0.02 to 1 active, B = 1 to 256, float32, and bfloat16 in pairs (half within a twelfth); with AVX2 and in float64
// (3.6 times as long) on Zen 5 at two of them.
inline bool has_groups(const LinearWork& work) {
  constexpr int64_t kElements = 1 << 24; // of x, which the weight's gradient copies into memory that is kept: 64 MB
  const bool copied = work.pass != Pass::grad_weight || work.B * work.support.inputs <= kElements;
  return work.has_plan && work.support.group % 16 == 0 && work.B > 1 && copied;
}
// For a call (of all inputs), a look at an input of a row, a row, a block each time it is copied, and a product.
struct GroupCost {
  double call, look, row, copy, product;
};
// Of processors that multiply 512 bits at once and others, float32 and pairs of bfloat16, by pass.
constexpr GroupCost kGroups[2][2][3]{{{{0, 0.95, 0, 3.3, 1.5}, {0, 0.9, 0.026, 4.3, 1.37}, {0, 0.7, 0.032, 16, 1.13}},
                                      {{3000, 0.9, 0, 6.4, 0.66}, {8000, 1.1, 0.022, 11, 0.43}, {8400, 0.9, 0.015, 18, 0.57}}},
                                     {{{0, 0.25, 0, 5.4, 0.55}, {0, 0.35, 0.012, 6.8, 0.5}, {0, 0.2, 0.018, 10.5, 0.65}},
                                      {{3000, 0.3, 0, 3.8, 0.3}, {8000, 0.4, 0.015, 6, 0.2}, {8400, 0.3, 0.016, 10.9, 0.32}}}};
inline double groups_cost(const LinearWork& work) {
  const GroupCost& cost = kGroups[wide()][work.has_pairs][int(work.pass)];
  const bool weights = work.pass == Pass::grad_weight; // which takes 128 rows at a time, others sixteen, by two copies
  const double B = double(work.B), rows = weights ? B : double((work.B + 15) / 16 * 16);
  const double copies = double(weights ? (work.B + 127) / 128 : (work.B + 31) / 32), d = work.density();
  const double vectors = double((work.support.outputs + 15) / 16);
  return cost.call / (double(work.support.inputs) * vectors) + cost.look * B / vectors + cost.row * rows +
         d * (cost.copy * copies + cost.product * (work.dtype == DType::f64 ? 3.6 : 1) * rows);
}

// By pairs of bfloat16, whatever is zero: faster than the dense way, which lays out as much, up to about 200 rows forward,
// 100 for the input's gradient, more where rows of outputs are long, and always for the weight's. Measured, as was the dense
// way in bfloat16, on Zen 5 at 1600 x 1500, 1600 x 1000, 1024 x 256, 784 x 128, 512 x 2048 and 64 x 64 (densities 0.1 to 1,
// G = 1 and 16), B = 2 to 256, of the weight's gradient to 1024: gradients take 0.8 times this in the median, eight in ten 0.7
// to 1.1 times, forward 0.6 to 1; on Zen 4 0.8 to 1.
inline bool has_pairs(const LinearWork& work) {
  return work.has_pairs && fits(work) &&
         (work.support.bits != nullptr || work.support.group % 16 == 0 || work.full());
}
inline double pairs_cost(const LinearWork& work) {
  const bool full = work.full(), bits = work.support.bits != nullptr;
  const double rows = bf16_rate(false) * double(work.B); // as long as so many
  const double vectors = double((work.support.outputs + 15) / 16), d = work.density();
  if (work.pass == Pass::grad_weight) return (full ? 2.5 : bits ? 4.2 : 6.2) + 0.66 * rows;
  if (work.pass == Pass::grad_input) // by O: the end of a dot product
    return (full ? 1 : 2 + 4.5 * d) + (0.69 + 2.8 / vectors) * rows;
  return (full ? 4.5 : bits ? 2.5 : 5 + 14 * d) + (wide() ? 1.5 : 0) + 0.64 * rows;
}

// How much longer a sparse way takes than with AVX-512, measured on Zen 4. PyTorch's products use AVX-512 wherever the
// processor has it, whatever instruction set this library is told to use; elsewhere they are slower as well.
inline double slowdown(Way way) {
  const bool panels = way == Way::panels;
  if (isa() == Isa::avx512 || (isa() == Isa::avx2 && !isa_supported(Isa::avx512))) return 1;
  if (isa() == Isa::avx2) return way == Way::groups ? 1.8 : panels ? 1.5 : 1.2;
  return panels ? 4 : 2;
}

struct Choice {
  Way way;
  double cost;
};

inline Choice fastest_way(const LinearWork& work) {
  if (work.B == 0 || work.blocks == 0) return {Way::rows, 0};
  Choice fastest{Way::rows, rows_cost(work) * slowdown(Way::rows)};
  const auto consider = [&](Way other, double cost) {
    if (cost < fastest.cost) fastest = {other, cost};
  };
  if (has_panels(work)) consider(Way::panels, panels_cost(work) * slowdown(Way::panels));
  if (has_tiles(work)) consider(Way::tiles, tiles_cost(work));
  if (has_lanes(work)) consider(Way::lanes, lanes_cost(work));
  if (has_groups(work)) consider(Way::groups, groups_cost(work) * slowdown(Way::groups));
  if (has_pairs(work)) consider(Way::pairs, pairs_cost(work));
  consider(Way::dense, dense_cost(work));
  return fastest;
}

// Both gradients at once, input by input (G a multiple of 16): for a call, and for an input, a look at one of a row and an
// active one there (over the vectors of outputs), for a block of each tile of rows and for a product of one. Fitted on Zen 5
// at 1600 x 1500, 1024 x 256, 784 x 128, 512 x 2048, 128 x 1024 and 64 x 64 (densities 0.05 to 1), B = 4 to 256, 0.02 to 0.6
// active: half within a tenth, nine in ten within two fifths; put beside the measured times of the other ways, it leads to 1 %
// more than the faster in the mean.
struct BothCost {
  double call, input, look, active, block, product;
};
constexpr BothCost kBoth[3]{{15900, 16, 2, 9.6, 4.75, 2.28}, {16400, 19.7, 1, 20.8, 7, 1.95}, {15400, 0, 5.1, 6.2, 9.1, 5.3}};

inline bool both_pay(const LinearWork& of_input, const LinearWork& of_weight) {
  if (of_input.support.group % 16 != 0 || !of_input.at_nonzeros || of_input.B < 2 || of_input.blocks == 0) return false;
  const BothCost& cost = kBoth[of_input.dtype == DType::f64 ? 2 : two_bytes(of_input) ? 1 : 0];
  const double B = double(of_input.B), active = B * of_input.rows_active, inputs = double(of_input.support.inputs);
  const double vectors = double((of_input.support.outputs + 15) / 16), tiles = double((of_input.B + 79) / 80);
  const double each = cost.call / inputs + cost.input + cost.look * B + cost.active * active;
  const double both = each / vectors + of_input.density() * (cost.block * tiles + cost.product * active);
  return both * slowdown(Way::rows) < fastest_way(of_input).cost + fastest_way(of_weight).cost;
}

} // namespace sparsekern
