// Convolution of one-channel images, max-pooling and k-winners in one pass: what the kernels of one instruction set offer.
// float32, stride 1, no padding, 2 x 2 windows; maps are channels-last.
#pragma once
#include "k_winners.h"

namespace sparsekern {

constexpr int64_t kMostTaps = 8; // columns of a kernel: what one register takes of a row of the image

struct ConvKWinnersArgs {
  PooledArgs pooled; // of the convolution's map, which never exists: rows.x is not read
  const float* x;    // (rows, height, width)
  const float* weight; // packed: see pack
  int64_t height, width, KH, KW;
};

struct ConvKWinnersKernels {
  // The weight (C, KH, KW) and bias (C,) or null as forward reads them: packed_size floats.
  int64_t (*packed_size)(int64_t C, int64_t taps);
  void (*pack)(const float* weight, const float* bias, int64_t C, int64_t taps, float* packed);
  // As KWinnersKernels::forward_pooled.
  void (*forward)(const ConvKWinnersArgs& args, int64_t begin, int64_t end, int64_t* counts);
  // Rows begin..end: each channel's sums over its winners of their gradient times the patch of the image that they were
  // taken from, and of their gradient: sums (C, KH * KW + 1).
  void (*gradient)(const ConvKWinnersArgs& args, const float* grad_y, int64_t begin, int64_t end, double* sums);
  // moments (taps + 1, taps + 1), all zero before: sums over rows and places of the products of any two pixels of the patch
  // there, with a 1 after its last pixel. Each part writes its own elements.
  int64_t (*patch_parts)(int64_t KH, int64_t KW);
  void (*patch_moments)(const float* x, int64_t rows, int64_t height, int64_t width, int64_t KH, int64_t KW, int64_t part,
                        double* moments);
};

extern const ConvKWinnersKernels conv_k_winners_baseline, conv_k_winners_avx2, conv_k_winners_avx512;

} // namespace sparsekern
