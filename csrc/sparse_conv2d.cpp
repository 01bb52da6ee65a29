// CPU bodies of the sparse_conv2d ops. Python has checked the arguments (sparsekern/ops/sparse_conv2d.py).
#include "sparse_conv2d.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <tuple>
#include <vector>

#include "grad_bias_calls.h"
#include "parallel.h"
#include "sparse_conv2d_kept.h"
#include "sparse_conv2d_ways.h"
#include "tensor.h"

namespace sparsekern {
namespace {

using Ints = std::vector<int64_t>;
using Gradients = std::tuple<Tensor, Tensor>; // grad_x, grad_weight

const SparseConv2dKernels& kernels() { return SPARSEKERN_SELECT(sparse_conv2d); }

Images images(const Tensor& t) { return {t.data_ptr(), !t.is_contiguous()}; }

Conv2d sizes(const Tensor& x, int64_t out_channels, int64_t kh, int64_t kw, const Ints& stride, const Ints& padding) {
  const int64_t oh = (x.size(2) + 2 * padding[0] - kh) / stride[0] + 1;
  const int64_t ow = (x.size(3) + 2 * padding[1] - kw) / stride[1] + 1;
  return {x.size(0), x.size(1), x.size(2), x.size(3), out_channels, kh, kw, oh, ow, stride[0], stride[1],
          padding[0], padding[1], dtype_of("sparse_conv2d", x)};
}

// The share of non-zeros, from up to 4,096 elements in evenly spread runs: to look at more takes as long as small layers.
double active_fraction(DType dtype, const void* data, int64_t n) {
  constexpr int64_t kRuns = 32, kRun = 128;
  if (n <= kRuns * kRun) return n == 0 ? 0.0 : double(kernels().count(dtype, data, n)) / double(n);
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2, step = (n - kRun) / (kRuns - 1);
  int64_t found = 0;
  for (int64_t i = 0; i < kRuns; i++) found += kernels().count(dtype, static_cast<const char*>(data) + i * step * size, kRun);
  return double(found) / double(kRuns * kRun);
}

double active_fraction(const Tensor& t) { return active_fraction(dtype_of("sparse_conv2d", t), t.data_ptr(), t.numel()); }

// Samples that a thread should take together: the kernels read a slice of weights once for up to eight.
int64_t together(int64_t samples) {
  return std::clamp<int64_t>(samples / torch::stable::get_num_threads(), 1, 8);
}

// Calls for each chunk of (samples x panels): samples where there are enough of them, else panels too.
template <class F> void parallel_parts(int64_t samples, int64_t panels, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (samples >= 4 * threads || threads == 1) {
    parallel_stretches(samples, together(samples), [&](int64_t begin, int64_t end) {
      f(Part{begin, end - begin, 0, panels});
    });
  } else {
    torch::stable::parallel_for(0, samples * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t first = i % panels, n = std::min(panels - first, end - i);
        f(Part{i / panels, 1, first, n});
        i += n;
      }
    });
  }
}

// The weight as the kernels read it, in the calling thread's scratch or kept.
class Packed {
 public:
  Packed(const Conv2d& conv, bool transposed, const Tensor& weight) {
    const bool channels_last = !weight.is_contiguous();
    const int64_t panels = kernels().panels(conv, transposed);
    const size_t bytes = kernels().packed_bytes(conv, transposed), weight_bytes = weight.numel() * weight.element_size();
    const auto pack = [&](const void* from, void* to) {
      torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        kernels().pack(conv, transposed, from, channels_last, to, begin, end - begin);
      });
    };
    if (conv.B <= kFewSamples && weight_bytes <= KeptWeights::kMostBytes) {
      static KeptWeights kept;
      kept_ = kept.get(kernels(), conv, transposed, weight.data_ptr(), weight_bytes, channels_last, bytes, pack);
      data_ = kept_->packed.get();
    } else {
      pack(weight.data_ptr(), data_ = scratch(0, bytes));
    }
  }
  void* data() const { return data_; }

 private:
  // 64->64 5x5 on 14x14: packing takes 20 us, a sample 28 us.
  static constexpr int64_t kFewSamples = 8;
  std::shared_ptr<const KeptWeight> kept_;
  void* data_;
};

// t in the memory format asked for: the dense convolution chooses its own by the weight's.
Tensor with_format(const Tensor& t, bool channels_last) {
  if (t.is_contiguous() == !channels_last) return t;
  Tensor out = empty_maps(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, channels_last);
  if (out.is_contiguous() && t.is_contiguous()) return t; // both formats at once
  return torch::stable::copy_(out, t);
}

Tensor to(const Tensor& t, ScalarType dtype) { return torch::stable::to(t, dtype); }

// PyTorch's own, by their C functions: to look them up by name, and to box lists, takes 4 us more.
Tensor dense_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                     const Ints& padding) {
  // PyTorch takes 20 to 50 times as long in float16 as in float32 (Zen 5) where the processor has no arithmetic of it.
  if (x.scalar_type() == ScalarType::Half && !processor().tiles) {
    std::optional<Tensor> wide_bias;
    if (bias) wide_bias = to(*bias, ScalarType::Float);
    return to(dense_forward(to(x, ScalarType::Float), to(weight, ScalarType::Float), wide_bias, stride, padding),
              ScalarType::Half);
  }
  constexpr int64_t kOnes[] = {1, 1}, kZeros[] = {0, 0};
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(x.get(), weight.get(), bias ? &bias_handle : nullptr,
                                                           stride.data(), 2, padding.data(), 2, kOnes, 2, 0, kZeros, 2,
                                                           1, &y));
  return with_format(Tensor(y), !x.is_contiguous());
}

// A weight of other strides than the kernels read, copied.
Tensor dense_strides(const Tensor& weight) {
  const int64_t c = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  const bool channels_last = weight.stride(0) == c * kh * kw && weight.stride(1) == 1 &&
                             weight.stride(2) == kw * c && weight.stride(3) == c;
  return channels_last ? weight : unstrided(weight);
}

// Whether some tap of the kernel lies on padding at every output.
bool has_idle_tap(int64_t taps, int64_t outputs, int64_t stride, int64_t padding, int64_t length) {
  for (int64_t tap = 0; tap < taps; tap++) {
    const int64_t before = padding - tap, first = before > 0 ? (before + stride - 1) / stride : 0;
    if (first >= outputs || first * stride - before >= length) return true;
  }
  return false;
}

// oneDNN leaves the gradient of an idle tap unwritten in bfloat16.
bool has_unwritten_taps(const Conv2d& conv) {
  return conv.dtype == DType::bf16 && (has_idle_tap(conv.KH, conv.OH, conv.SH, conv.PH, conv.H) ||
                                       has_idle_tap(conv.KW, conv.OW, conv.SW, conv.PW, conv.W));
}

// The gradients that are wanted; in one call, since oneDNN then lays grad_y out once.
Gradients dense_backward(const Conv2d& conv, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                         const Ints& stride, const Ints& padding, bool want_input, bool want_weight) {
  // PyTorch would sum float16 in float16, except where the processor has dot products.
  if (conv.dtype == DType::f16 || has_unwritten_taps(conv)) {
    Conv2d wide_conv = conv;
    wide_conv.dtype = DType::f32;
    const auto [grad_x, grad_weight] =
        dense_backward(wide_conv, to(grad_y, ScalarType::Float), to(x, ScalarType::Float), to(weight, ScalarType::Float),
                       stride, padding, want_input, want_weight);
    return {want_input ? to(grad_x, x.scalar_type()) : grad_x, want_weight ? to(grad_weight, x.scalar_type()) : grad_weight};
  }
  constexpr int64_t kOnes[] = {1, 1}, kZeros[] = {0, 0};
  const int32_t wanted[] = {want_input, want_weight, 0};
  AtenTensorHandle grad_x, grad_weight, unused;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      grad_y.get(), x.get(), weight.get(), nullptr, 0, stride.data(), 2, padding.data(), 2, kOnes, 2, 0, kZeros, 2, 1,
      wanted, 3, &grad_x, &grad_weight, &unused));
  const Tensor nothing(unused);
  return {Tensor(grad_x), Tensor(grad_weight)};
}

// Python has checked what users pass; this keeps a wrong call of the bare op from reading beyond a tensor.
void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1) &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
                  "sparse_conv2d: wants x (B, C, H, W), weight (O, C, KH, KW) and bias (O,)");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()),
                  "sparse_conv2d: wants weight and bias in the dtype of x");
}

Tensor sparse_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding) {
  check(x, weight, bias);
  const Conv2d conv = sizes(x, weight.size(0), weight.size(2), weight.size(3), stride, padding);
  STD_TORCH_CHECK(conv.H + 2 * conv.PH >= conv.KH && conv.W + 2 * conv.PW >= conv.KW,
                  "sparse_conv2d: wants a padded input of at least the kernel size");
  const bool channels_last = !x.is_contiguous();
  if (!sparse_forward_pays({conv, kernels(), channels_last, channels_last}, active_fraction(x)))
    return dense_forward(x, weight, bias, stride, padding);
  Tensor y = empty_maps(x, {conv.B, conv.O, conv.OH, conv.OW}, channels_last);
  if (y.numel() == 0) return y;
  weight = dense_strides(weight);
  const Packed packed(conv, false, weight);
  std::optional<Tensor> bias_values;
  if (bias) bias_values = unstrided(*bias);
  const void* bias_data = bias ? bias_values->data_ptr() : nullptr;
  const Images from = images(x), to = {y.data_ptr(), from.channels_last};
  parallel_parts(conv.B, kernels().panels(conv, false), [&](Part part) {
    kernels().forward(conv, from, packed.data(), bias_data, to, part);
  });
  return y;
}

void keep_nonzeros(const Conv2d& conv, const Tensor& x, const Tensor& grad_x) {
  torch::stable::parallel_for(0, conv.B, 1, [&](int64_t begin, int64_t end) {
    const int64_t n = conv.C * conv.H * conv.W, size = int64_t(x.element_size());
    kernels().keep(conv.dtype, static_cast<const char*>(x.data_ptr()) + begin * n * size,
                   static_cast<char*>(grad_x.data_ptr()) + begin * n * size, (end - begin) * n);
  });
}

// grad_x over the non-zeros of grad_y.
void grad_input(const Conv2d& conv, const Tensor& grad_y, const Tensor& x, const Tensor& weight, bool at_nonzeros,
                const Tensor& grad_x) {
  const Packed packed(conv, true, weight);
  const Images from = images(grad_y), to = images(grad_x);
  parallel_parts(conv.B, kernels().panels(conv, true), [&](Part part) {
    kernels().grad_input(conv, from, packed.data(), at_nonzeros ? x.data_ptr() : nullptr, to, part);
  });
}

// grad_x at the non-zeros of x.
void grad_input_at_nonzeros(const Conv2d& conv, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                            const Tensor& grad_x) {
  const Packed packed(conv, false, weight);
  parallel_stretches(conv.B, together(conv.B), [&](int64_t begin, int64_t end) {
    kernels().gradients(conv, false, images(grad_y), images(x), packed.data(), nullptr, grad_x.data_ptr(),
                        {begin, end - begin, 0, conv.C});
  });
}

// Into how many stretches the samples are cut for grad_weight, so that threads rarely look at the same ones: the more, the
// longer it takes to add up their sums, which may be a fiftieth of all.
int64_t stretches(const Conv2d& conv, double cost) {
  constexpr double kSum = 0.25; // ns for one more sum of a weight, Zen 5
  const double each = double(conv.O * conv.C * conv.KH * conv.KW) * kSum;
  int64_t n = 1;
  while (n < 8 && conv.B >= 16 * n && double(2 * n - 1) * each <= 0.02 * cost) n *= 2;
  return n;
}

// grad_weight over the non-zeros of grad_y or of x; with those of x, grad_x at them too, if not null. Each thread takes some
// channels of a stretch of samples, whose sums are added up in one order whatever the threads are.
void grad_weight(const Conv2d& conv, bool by_grad, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                 const Tensor& grad_weight, void* grad_x, int64_t stretches) {
  std::optional<Packed> packed;
  if (grad_x != nullptr) packed.emplace(conv, false, weight);
  const int64_t channels = by_grad ? conv.O : conv.C;
  const size_t bytes = kernels().packed_bytes(conv, by_grad);
  char* sums = static_cast<char*>(scratch(8, size_t(stretches) * bytes));
  torch::stable::parallel_for(0, stretches * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t stretch = i / channels, first = i % channels, n = std::min(channels - first, end - i);
      const int64_t sample = conv.B * stretch / stretches, samples = conv.B * (stretch + 1) / stretches - sample;
      kernels().gradients(conv, by_grad, images(grad_y), images(x), packed ? packed->data() : nullptr,
                          sums + size_t(stretch) * bytes, grad_x, {sample, samples, first, n});
      i += n;
    }
  });
  torch::stable::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    kernels().write_grad_weight(conv, by_grad, sums, stretches, images(grad_weight), begin, end - begin);
  });
}

std::tuple<Tensor, Tensor, Tensor> sparse_conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, Ints stride,
                                                          Ints padding, bool at_nonzeros, bool want_input,
                                                          bool want_weight, bool want_bias) {
  const Conv2d conv = sizes(x, weight.size(0), weight.size(2), weight.size(3), stride, padding);
  weight = dense_strides(weight);
  const double in_x = active_fraction(x), in_grad = active_fraction(grad_y);
  const ConvWork work{conv, kernels(), !x.is_contiguous(), !grad_y.is_contiguous()};
  const ConvWays ways = backward_ways(work, in_x, in_grad, at_nonzeros, want_input, want_weight);
  const bool dense_input = want_input && ways.input == ConvWay::dense;
  const bool dense_weight = want_weight && ways.weight == ConvWay::dense;
  Tensor grad_x = empty(x.scalar_type(), {0}), grad_w = empty(x.scalar_type(), {0});
  if (dense_input || dense_weight) {
    // oneDNN goes by x's and the weight's memory format; where one channel leaves both open and no values of the weight are
    // needed, it had better be that of grad_y.
    const bool by_grad = conv.C == 1 && !dense_input && !grad_y.is_contiguous();
    const Tensor like = by_grad ? empty_maps(x, {conv.O, conv.C, conv.KH, conv.KW}, true) : weight;
    const auto [of_x, of_w] = dense_backward(conv, grad_y, x, like, stride, padding, dense_input, dense_weight);
    if (dense_input) grad_x = with_format(of_x, !x.is_contiguous());
    if (dense_input && at_nonzeros) keep_nonzeros(conv, x, grad_x);
    if (dense_weight) grad_w = with_format(of_w, !weight.is_contiguous());
  }
  const bool both = want_input && want_weight && ways.input == ConvWay::by_x && ways.weight == ConvWay::by_x;
  if (want_input && !dense_input) {
    grad_x = empty_maps(x, {conv.B, conv.C, conv.H, conv.W}, !x.is_contiguous());
    if (grad_x.numel() > 0 && !both) {
      if (ways.input == ConvWay::by_x) grad_input_at_nonzeros(conv, grad_y, x, weight, grad_x);
      else grad_input(conv, grad_y, x, weight, at_nonzeros, grad_x);
    }
  }
  if (want_weight && !dense_weight) {
    grad_w = empty_maps(x, {conv.O, conv.C, conv.KH, conv.KW}, !weight.is_contiguous());
    grad_weight(conv, ways.weight == ConvWay::by_grad, grad_y, x, weight, grad_w, both ? grad_x.data_ptr() : nullptr,
                stretches(conv, ways.cost));
  }
  return {grad_x, grad_w, want_bias ? grad_bias(grad_y) : empty(x.scalar_type(), {0})};
}

} // namespace

bool all_dense_pays(const Conv2d& conv, Images x, bool want_input) {
  const auto active = [&] { return active_fraction(conv.dtype, x.data, conv.B * conv.C * conv.H * conv.W); };
  return conv.C > 1 && conv.O > 1 && !has_unwritten_taps(conv) &&
         all_dense_pays({conv, kernels(), x.channels_last, x.channels_last}, active, want_input);
}

} // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparsekern::sparse_conv2d));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparsekern::sparse_conv2d_backward));
}
