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

// A kernel call works for one range of samples and one range of panels (16 or 32 channels of the result), on the calling
// thread; every sum has one fixed order, whatever the ranges.
struct Part {
  int64_t first_sample, samples, first_panel, panels;
};

// What the kernels of an instruction set take, in dense float32 products of 16 channels: for a sparse one, for looking for
// the non-zeros of 16 channels, and for writing 16 channels of a result.
struct Cost {
  double product, compress, finish;
};

struct SparseConv2dKernels {
  Cost cost;
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
  void (*forward)(const Conv2d& conv, Images x, void* packed, const void* bias, Images y, Part part);
  // grad_x over the non-zeros of grad_y; with `mask` (an x, laid out as grad_x) only where that is not zero.
  void (*grad_input)(const Conv2d& conv, Images grad_y, void* packed, const void* mask, Images grad_x, Part part);
  // grad_x, laid out as x, over the non-zeros of x and only there; the weight packed as for the forward.
  void (*grad_input_at_nonzeros)(const Conv2d& conv, Images grad_y, Images x, void* packed, void* grad_x,
                                 int64_t first_sample, int64_t count);
  // grad_weight (O, C, KH, KW) over the non-zeros of grad_y or of x: parts first..first+rows of the weight_rows into which
  // the work falls.
  int64_t (*weight_rows)(const Conv2d& conv, bool by_grad);
  void (*grad_weight)(const Conv2d& conv, bool by_grad, Images grad_y, Images x, Images grad_weight, int64_t first,
                      int64_t rows);
};

// Whether all passes of a training step had better be PyTorch's own: where the dense way takes them, the backward pass for a
// dense gradient, and calling a Python autograd function takes a twentieth of them or more. x holds (B, C, H, W) in any order.
bool small_and_dense(const Conv2d& conv, const void* x);

// Float32 products of a pass, or as many of another type as take as long, up to which that is so: a third of a millisecond
// on one Zen 4 core. The function takes 40 to 90 us more than PyTorch's node; sparse gradients might save more.
constexpr double kSmallProducts = 1 << 24;

extern const SparseConv2dKernels sparse_conv2d_baseline, sparse_conv2d_avx2, sparse_conv2d_avx512;

} // namespace sparsekern
