// The sparse linear layer on the CPU: y = x W^T + bias and its gradients, where W exists only in some blocks and x and
// grad_y may be mostly zero. Shapes: x (B, I), y (B, O), all contiguous.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sparsekern {

// The existing blocks of G neighbouring outputs by one input, in compressed-sparse-column order.
struct LinearSupport {
  int64_t inputs, outputs, group; // I, O, G
  const int32_t* ccol;            // (I + 1,): where each input's blocks begin
  const int32_t* rows;            // (blocks,): each block's group of outputs, ascending within an input
  const uint64_t* bits;           // (I, ceil(O / 64)): which weights exist, for G = 1, or null
};

// The weights of single outputs in the order in which one sample in each lane meets them: by part of the outputs, by part
// of the inputs, by number of weights that an output has there, by output, by input.
struct LinearPlan {
  int64_t inputs, outputs;
  const int32_t* cells = nullptr;  // (output parts * input parts + 1,): where the outputs of each part of both begin
  const int32_t* starts = nullptr; // (entries + 1,): where the weights of each of these begin
  const int32_t* output = nullptr; // (entries,)
  const int32_t* input = nullptr;  // (weights,): number within its part
  const int32_t* source = nullptr; // (weights,): which stored weight it is
};
constexpr int64_t kPlanOutputs = 256, kPlanInputs = 96;

// The blocks of each group of outputs, in the order of its inputs.
struct LinearGroups {
  const int32_t* starts = nullptr; // (groups + 1,): where the blocks of each begin
  const int32_t* input = nullptr;  // (blocks,)
  const int32_t* source = nullptr; // (blocks,): which stored block it is
};
constexpr int64_t kLinearGroupSamples = 32; // at a time

struct SparseLinearKernels {
  // Rows [begin, end) of y. bias may be null.
  void (*forward)(DType, const LinearSupport&, const void* x, const void* weight, const void* bias, void* y,
                  int64_t begin, int64_t end);
  // Rows [begin, end) of grad_x, zero where x is zero if at_nonzeros.
  void (*grad_input)(DType, const LinearSupport&, const void* grad_y, const void* x, const void* weight, void* grad_x,
                     bool at_nonzeros, int64_t begin, int64_t end);
  // The blocks of inputs [begin, end) of grad_weight, summed over B rows in ascending order.
  void (*grad_weight)(DType, const LinearSupport&, const void* grad_y, const void* x, void* grad_weight, int64_t B,
                      int64_t begin, int64_t end);
  // The same by panels of weights, dense in the first-level cache, for a part of the rows and columns: outputs, or
  // inputs, [first, last), where first is a multiple of kLinearPanel. Zeros may be multiplied; if `all`, those of x (of
  // grad_y for its gradient) are as well, by sums in registers, which is faster where few are zero.
  void (*forward_panels)(DType, const LinearSupport&, const void* x, const void* weight, const void* bias, bool all, void* y,
                         int64_t begin, int64_t end, int64_t first, int64_t last);
  // Weights [begin, end) in the order of a plan, in the accumulator type; by all of them rows [begin, end) and outputs
  // [first, last) of y, where first is a multiple of kPlanOutputs.
  void (*order_weights)(DType, const LinearPlan&, const void* weight, void* ordered, int64_t begin, int64_t end);
  void (*forward_lanes)(DType, const LinearPlan&, const void* x, const void* ordered, const void* bias, void* y,
                        int64_t begin, int64_t end, int64_t first, int64_t last);
  // By groups of outputs, G a multiple of 16: groups [first, last) of rows [begin, end) of y; inputs [first, last) of rows
  // [begin, end) of grad_x; the blocks of groups [begin, end) of grad_weight by x as samples (ceil(B / kLinearGroupSamples), I,
  // kLinearGroupSamples), room for the accumulator type, of which group_samples transposes [begin, end).
  void (*forward_groups)(DType, const LinearSupport&, const LinearGroups&, const void* x, const void* weight, const void* bias,
                         void* y, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*grad_input_groups)(DType, const LinearSupport&, const LinearGroups&, const void* grad_y, const void* x,
                            const void* weight, void* grad_x, bool at_nonzeros, int64_t begin, int64_t end, int64_t first,
                            int64_t last);
  void (*group_samples)(DType, const void* x, int64_t B, int64_t I, void* samples, int64_t begin, int64_t end);
  void (*grad_weight_groups)(DType, const LinearSupport&, const LinearGroups&, const void* grad_y, const void* samples,
                             void* grad_weight, int64_t B, int64_t begin, int64_t end);
  void (*grad_input_panels)(DType, const LinearSupport&, const void* grad_y, const void* x, const void* weight,
                            void* grad_x, bool at_nonzeros, bool all, int64_t begin, int64_t end, int64_t first,
                            int64_t last);
  // The same of bfloat16 by instructions that multiply pairs, where pairs() says that the processor has them.
  bool (*pairs)();
  void (*forward_pairs)(const LinearSupport&, const void* x, const void* weight, const void* bias, void* y, int64_t begin,
                        int64_t end, int64_t first, int64_t last);
  void (*grad_input_pairs)(const LinearSupport&, const void* grad_y, const void* x, const void* weight, void* grad_x,
                           bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last);
  // grad_y (B, O) as panels [begin, end) of `tiles` (panels, ceil(B / 2), kLinearPanel) of pairs of samples; from all of
  // them, which reach over every group of outputs, the stored weights of inputs [begin, end) of grad_weight.
  void (*pair_rows)(const void* grad_y, int64_t B, int64_t O, void* tiles, int64_t begin, int64_t end);
  void (*grad_weight_pairs)(const LinearSupport&, const void* tiles, const void* x, void* grad_weight, int64_t B,
                            int64_t begin, int64_t end);
  // Rows [begin, end) of grad_y (B, O) as tiles of kLinearPanel columns, in the accumulator type, and the bytes that they take,
  // which depend on B and O alone.
  size_t (*tiles_bytes)(DType, int64_t B, int64_t O);
  void (*tile_rows)(DType, const void* grad_y, int64_t O, void* tiles, int64_t begin, int64_t end);
  void (*grad_weight_panels)(DType, const LinearSupport&, const void* tiles, const void* x, bool all, void* grad_weight,
                             int64_t B, int64_t begin, int64_t end); // all: by a bitmap, or G a multiple of 16
  // From these tiles both gradients, G a multiple of 16: columns [begin, end) of grad_x, zero where x is zero, and the blocks of
  // these inputs of grad_weight.
  void (*both_gradients)(DType, const LinearSupport&, const void* tiles, const void* x, const void* weight, void* grad_x,
                         void* grad_weight, int64_t B, int64_t begin, int64_t end);
  // Non-zeros among n < 2^31 elements.
  int64_t (*count)(DType, const void* x, int64_t n);
  // Lays the weights of inputs [begin, end) and outputs [first, last) out as a dense matrix (end - begin, last - first),
  // where first and last are multiples of kLinearPanel or O; the way back, from (end - begin, O).
  void (*expand)(DType, const LinearSupport&, const void* weight, void* dense, int64_t begin, int64_t end, int64_t first,
                 int64_t last);
  void (*collect)(DType, const LinearSupport&, const void* dense, void* weight, int64_t begin, int64_t end);
  // Clears each of n elements of grad where x is zero.
  void (*clear_at_zeros)(DType, const void* x, void* grad, int64_t n);
};
constexpr int64_t kLinearPanel = 64;
// The density above which panels of the input's gradient transpose the weights in registers, where they can. With warm
// caches both ways of laying them out take the same time at 0.1 (G = 1) and 0.06 (G = 16), with cold ones this one less.
constexpr double kRegisterTiles = 0.07;

extern const SparseLinearKernels sparse_linear_baseline, sparse_linear_avx2, sparse_linear_avx512;

} // namespace sparsekern
