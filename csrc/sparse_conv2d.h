// Convolution over the non-zeros of its input: what the registration (sparse_conv2d.cpp) and the kernels share.
#pragma once
#include "isa.h"

namespace sparsekern {

// y (B, O, OH, OW) from x (B, C, H, W) and weight (O, C, KH, KW); stride (SH, SW), padding (PH, PW).
struct Conv2d {
  int64_t B, C, H, W, O, KH, KW, OH, OW, SH, SW, PH, PW;
  DType dtype;
  bool operator==(const Conv2d&) const = default;
};

// A batch of images, contiguous (NCHW) or channels-last (NHWC).
struct Images {
  void* data;
  bool channels_last;
};

constexpr int64_t kMaxKernelWidth = 64; // wider kernels take the dense way
constexpr int kMaxTaps = 5;             // of a kernel row that a pass takes together
// Of a panel of the dense image, in the gradients: so much of it as passes at a time stays in the first-level cache, or, of
// more samples for longer lists, in the second.
constexpr int64_t kBandBytes = 24576, kPanelBytes = 131072;

// A kernel call works for one range of samples and one range of panels (16 or 32 channels of the result), on the calling
// thread; every sum has one fixed order, whatever the ranges.
struct Part {
  int64_t first_sample, samples, first_panel, panels;
};

// The same for channels of what has the non-zeros.
struct ChannelPart {
  int64_t first_sample, samples, first, channels;
};

// How much longer the kernels of an instruction set take than with AVX-512: for products pixel by pixel and channel by
// channel, and for elements of images.
struct CostFactors {
  double product, list, element;
};

// Of a weight's bytes: see fingerprint.h.
struct Fingerprint {
  uint64_t lanes[128];
  bool operator==(const Fingerprint&) const = default;
};

struct SparseConv2dKernels {
  CostFactors factors;
  Fingerprint (*fingerprint)(const void* data, size_t bytes);
  // Non-zeros (NaN among them) of n elements.
  int64_t (*count)(DType dtype, const void* x, int64_t n);
  // out = x where mask is not zero, else zero.
  void (*keep)(DType dtype, const void* mask, void* x, int64_t n);

  // How many panels a result has. `transposed`: the gradient of the input, else the forward.
  int64_t (*panels)(const Conv2d& conv, bool transposed);
  // The weight (contiguous or channels-last) as one call reads it: accumulator type, packed_bytes(...) long.
  size_t (*packed_bytes)(const Conv2d& conv, bool transposed);
  void (*pack)(const Conv2d& conv, bool transposed, const void* weight, bool channels_last, void* packed,
               int64_t first_panel, int64_t panels);
  // y = conv(x) + bias, over the non-zeros of x. bias may be null.
  void (*forward)(const Conv2d& conv, Images x, const void* packed, const void* bias, Images y, Part part);
  // grad_x over the non-zeros of grad_y; with `mask` (an x, laid out as grad_x) only where that is not zero.
  void (*grad_input)(const Conv2d& conv, Images grad_y, const void* packed, const void* mask, Images grad_x, Part part);
  // Of grad_weight's sums and of grad_x (laid out as x, zero where x is) what is not null, over the non-zeros of x, or, the
  // sums alone, over those of grad_y. packed: for grad_x, the weight packed as for the forward. weight_sums: as the packed
  // weight (transposed: by_grad), of the part's samples and channels.
  void (*gradients)(const Conv2d& conv, bool by_grad, Images grad_y, Images x, const void* packed, void* weight_sums,
                    void* grad_x, ChannelPart part);
  // grad_weight (O, C, KH, KW) for some channels: the sums of several stretches of samples, which lie one behind the other.
  void (*write_grad_weight)(const Conv2d& conv, bool by_grad, void* weight_sums, int64_t stretches, Images grad_weight,
                            int64_t first, int64_t channels);
};

// Whether PyTorch's own autograd node had better do all passes of a training step: see sparse_conv2d_ways.h. x holds
// (B, C, H, W), contiguous or channels-last.
bool all_dense_pays(const Conv2d& conv, Images x, bool want_input);

extern const SparseConv2dKernels sparse_conv2d_baseline, sparse_conv2d_avx2, sparse_conv2d_avx512;

} // namespace sparsekern
