// k-winners (Algorithm 1): what the kernels of one instruction set offer.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sparsekern {

constexpr int kFactorsSlot = 4; // of scratch(): the kernels use 0 to 3

struct KWinnersArgs {
  DType dtype;
  const void* x;        // (rows, n)
  void* y;              // (rows, n)
  uint8_t* winners;     // (rows, 2 * ceil(n / 16)): a bit a unit, the lowest first
  const float* factors; // (n,): what each unit is multiplied by before the comparison, or null
  int64_t n, k;
  int64_t channels, inner; // unit u belongs to channel u / inner % channels
};

// Feature maps that are max-pooled first: rows.x is (rows, C, H, W) or (rows, H, W, C), everything else in `rows` is about
// the n = C * (H / pool) * (W / pool) pooled units in the same order.
struct PooledArgs {
  KWinnersArgs rows;
  int64_t C, H, W, pool;
  bool channels_last;
  int32_t* offsets; // (rows, k): where in its map each winner, in the order of the pooled units, was taken from. Null if T is
                    // its own accumulator type and nobody wants to know.
  // (C,) in the accumulator type, or null: units are (x - mean) * scale, rounded to x's type. scale > 0, so that pooling
  // may come first.
  const void *mean, *scale;
  const int32_t* places; // (n,): where in its row of y each unit stands, or null where y has the units' order
};

// The gradient of PooledArgs with mean and scale = 1 / deviation of x's own channels, as batch norm takes them.
struct NormGradArgs {
  DType dtype;
  const void *grad_y, *y;   // (rows, n)
  const uint8_t* winners;   // (rows, 2 * ceil(n / 16))
  const int32_t* offsets;   // (rows, k)
  const void* x;            // (rows, C, H, W) or (rows, H, W, C)
  void* grad_x;             // as x
  const void *mean, *scale; // (C,) in the accumulator type
  int64_t n, k, C, inner;   // of the pooled units: see KWinnersArgs
  int64_t pixels;           // H * W
  bool channels_last;
  const int32_t* places; // (n,): where in its row of grad_y and y each unit stands, or null: as PooledArgs
};

struct KWinnersKernels {
  // factors[u] = exp(strength * (target - duty_cycle[channel of u])), taken in double and rounded once.
  void (*boost_factors)(const float* duty_cycle, double target, double strength, int64_t channels, int64_t inner,
                        int64_t n, float* factors);
  // Rows begin..end: y, winners, and the wins of each channel added to counts (channels,).
  void (*forward)(const KWinnersArgs& args, int64_t begin, int64_t end, int64_t* counts);
  // Rows begin..end of grad_x (rows, n): grad_y where the winners' bit is set, else 0.
  void (*backward)(DType dtype, const void* grad_y, const uint8_t* winners, void* grad_x, int64_t n, int64_t begin,
                   int64_t end);
  void (*forward_pooled)(const PooledArgs& args, int64_t begin, int64_t end, int64_t* counts);
  // Rows begin..end of grad_x (rows, map): grad_y (rows, n) at the winners' offsets (rows, k), else 0. places: of grad_y.
  void (*backward_pooled)(DType dtype, const void* grad_y, const int32_t* places, const uint8_t* winners,
                          const int32_t* offsets, void* grad_x, int64_t n, int64_t k, int64_t map, int64_t begin,
                          int64_t end);
  // Rows begin..end of x (rows, C, H, W): each row's channel means and sums of squared deviations, moments (rows, 2, C).
  void (*moments)(DType dtype, const void* x, bool channels_last, int64_t C, int64_t pixels, double* moments,
                  int64_t begin, int64_t end);
  // Rows begin..end: sums over a channel's winners of grad_y and of grad_y * y, sums (rows, 2, C);
  void (*norm_grad_sums)(const NormGradArgs& args, double* sums, int64_t begin, int64_t end);
  // and grad_x = scale * (grad of the units - mean of grad_y - units * mean of grad_y * y), means (2, C) over all of x.
  void (*norm_grad)(const NormGradArgs& args, const double* means, int64_t begin, int64_t end);
  // duty_cycle = duty_cycle * keep + counts / divisor (equation 6).
  void (*update)(float* duty_cycle, const int64_t* counts, int64_t channels, double keep, double divisor);
};

extern const KWinnersKernels k_winners_baseline, k_winners_avx2, k_winners_avx512;

} // namespace sparsekern
