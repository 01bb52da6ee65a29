// Which way through a convolution and its gradients is fastest: over the non-zeros of x, over those of grad_y, or densely.
//
// Costs are ns on one core of Zen 5 (family 26) with AVX-512. Fitted to eleven shapes (3->64 7x7 to 256->256 1x1, stride 1
// and 2), B = 1 to 64, both memory formats, 0.02 to 0.6 of x and 0.02 to 1 of grad_y active, float32 and bfloat16: half of
// the passes are within a sixth, and the way that they lead to takes 1 to 2 % more than the best one in the mean. What Zen 4
// takes against that was fitted to eight shapes (1,200 passes): 1 to 2 % more as well. benchmarks/crossovers.py measures them.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "sparse_conv2d.h"

namespace sparsekern {

enum class ConvWay { by_x, by_grad, dense };

// A convolution, or its gradients, as the costs see it.
struct ConvWork {
  const Conv2d& conv;
  const SparseConv2dKernels& kernels;
  bool x_channels_last, y_channels_last;

  double x_elements() const { return double(conv.B * conv.C * conv.H * conv.W); }
  double y_elements() const { return double(conv.B * conv.O * conv.OH * conv.OW); }
  double weights() const { return double(conv.O * conv.C * conv.KH * conv.KW); }
  // The kernels index one sample with 32 bits and keep a bounded number of tap groups.
  bool sparse_possible() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const int64_t rows = conv.H + 2 * conv.PH, columns = conv.W + 2 * conv.PW + 2 * kMaxKernelWidth;
    return conv.C * conv.H * conv.W < kMost && conv.O * conv.OH * conv.OW < kMost && rows < kMost && columns < kMost &&
           rows * columns < kMost / 32 && conv.KW <= kMaxKernelWidth && conv.SW <= kMaxKernelWidth &&
           conv.SH <= kMaxKernelWidth;
  }
};

// How much longer than on Zen 5 it takes where 512 bits are multiplied in two halves, as Zen 4 does: PyTorch's products, ours,
// and all else that the kernels do. By AVX2 (260 passes) and in float64 (160) it leads to 5 % and 2 % more than the faster way.
struct Halved {
  double dense = 1, products = 1, rest = 1;
};
inline Halved halved() {
  return processor().wide ? Halved{} : Halved{1.85, isa() == Isa::avx512 ? 1.5 : 1.3, 1.3};
}

// What the passes over non-zeros pixel by pixel take (y by x, or grad_x by grad_y): for a column of a row that a kernel row and
// a panel meet, more where the number of non-zeros there cannot be predicted, for each of them, for 16 products, for an
// element of what has the non-zeros and of the other one (contiguous, channels-last), and for a weight.
struct SparseCost {
  double column, uncertain, nonzero, products, source[2], other[2], weight;
};
constexpr SparseCost kResultCost{1.3, 1.4, 0.44, 0.170, {0.31, 0.17}, {0.28, 0.22}, 0.10};

inline double sparse_cost(const ConvWork& work, bool by_grad, double active) {
  constexpr SparseCost cost = kResultCost;
  const Conv2d& conv = work.conv;
  const int64_t from = by_grad ? conv.O : conv.C, to = by_grad ? conv.C : conv.O;
  const double panels = double(work.kernels.panels(conv, by_grad));
  const double columns = double(conv.B * conv.KH * conv.OH * (by_grad ? conv.OW : conv.W)) * panels;
  const double products = double(conv.B * conv.OH * conv.OW * conv.KH * conv.KW * ((to + 15) / 16));
  const double nonzeros = active * double(from); // of a pixel
  const double uncertain = (nonzeros < 1 ? nonzeros : 1) * (1 - active);
  const double x = work.x_elements() * (by_grad ? cost.other : cost.source)[work.x_channels_last];
  const double y = work.y_elements() * (by_grad ? cost.source : cost.other)[work.y_channels_last];
  const bool wide = conv.dtype == DType::f64; // sums of half as many lanes, and of fewer panels and outputs at a time
  const Halved slower = halved();
  return work.kernels.factors.product * (wide ? 4.5 : 1) *
             (slower.rest * columns * (cost.column + uncertain * cost.uncertain + nonzeros * cost.nonzero) +
              slower.products * nonzeros * products * cost.products) +
         slower.rest * (work.kernels.factors.element * (wide ? 2 : 1) * (x + y) + work.weights() * cost.weight);
}

// What the passes channel by channel take (grad_weight, grad_x at the non-zeros of x, or both): for a list that a pass takes,
// for 16 products (of both gradients), to list a non-zero, and the rest as above. registers: for the taps of a pass.
struct ListCost {
  double list, products, nonzero, source[2], other[2], weight;
  int64_t registers;
};
constexpr ListCost kWeightCost{14.5, 0.246, 1.28, {0.31, 0.19}, {0.55, 0.26}, 0.31, 30};
constexpr ListCost kValueCost{9.4, 0.291, 2.47, {0.38, 0.26}, {0.42, 0.28}, 0.10, 30};
constexpr ListCost kBothCost{22.1, 0.282, 3.71, {0.18, 0.09}, {0.39, 0.29}, 0.42, 14};

inline double list_cost(const ConvWork& work, const ListCost& cost, bool by_grad, double active) {
  const Conv2d& conv = work.conv;
  const auto parts_of = [](int64_t n, int64_t part) { return (n + part - 1) / part; };
  const int64_t from = by_grad ? conv.O : conv.C, to = by_grad ? conv.C : conv.O, vectors = parts_of(to, 16);
  const int64_t panels = work.kernels.panels(conv, by_grad), lanes = vectors / panels * 16;
  // As in sparse_conv2d_gradients.h: groups of taps, what a pass takes together, and how many passes a list takes.
  const int64_t taps = by_grad ? conv.KW : parts_of(conv.KW, conv.SW), chunks = parts_of(taps, kMaxTaps);
  const int64_t groups = by_grad ? chunks : chunks * std::min(conv.SW, conv.KW);
  const int64_t parts = std::clamp<int64_t>(cost.registers * 16 / (parts_of(taps, chunks) * lanes), 1, 8);
  const int64_t passes =
      groups * (by_grad && conv.KH > 1 ? parts_of(conv.KH, parts) * panels : conv.KH * parts_of(panels, parts));
  const int64_t height = by_grad ? conv.H + 2 * conv.PH : conv.OH;
  const int64_t width = by_grad ? conv.W + 2 * conv.PW : conv.OW + 2 * (taps - 1), panel_bytes = height * width * lanes * 4;
  const int64_t samples = std::clamp<int64_t>(conv.B, 1, 8);
  const double at_once = by_grad ? double(std::clamp<int64_t>(kPanelBytes / panel_bytes, 1, samples)) : 1;
  const double bands = at_once > 1 ? 1 : std::max(1.0, double(panel_bytes) / kBandBytes);
  const double lists = double(conv.B * from * passes) / at_once * bands;
  // By x, columns whose windows reach beyond the result are passed whole.
  const double rows = double(by_grad ? conv.B * conv.OH * conv.OW : conv.B * conv.OH * conv.W / conv.SW);
  const double nonzeros = active * double(from), passed = nonzeros * rows * double(passes) / double(groups);
  const double products = nonzeros * rows * double(conv.KH * conv.KW * vectors);
  const double met = lists > 0 ? lists * (1 - std::exp(-passed * double(chunks) / lists)) : 0; // that have a non-zero
  const double x_elements = work.x_elements(), y_elements = work.y_elements();
  const double x = x_elements * (by_grad ? cost.other : cost.source)[work.x_channels_last];
  const double y = y_elements * (by_grad ? cost.source : cost.other)[work.y_channels_last];
  const bool wide = conv.dtype == DType::f64;
  const Halved slower = halved();
  return work.kernels.factors.list * (wide ? 4.5 : 1) *
             (slower.rest * met * cost.list + slower.products * products * cost.products) +
         slower.rest * (work.kernels.factors.element * (wide ? 2 : 1) *
                            (active * (by_grad ? y_elements : x_elements) * cost.nonzero + x + y) +
                        work.weights() * cost.weight);
}

// What a pass of PyTorch's takes: for the call, for 16 products forward and backward, for an element of x or y, and for a
// weight. The call and the elements of contiguous images and channels-last ones: oneDNN wants blocks.
struct DenseCost {
  double call[2], forward, backward, element[2], weight;
};

inline DenseCost dense_cost(DType dtype) {
  const bool tiles = processor().tiles; // of bfloat16, whose rate is an estimate; the newest have them of float16 too
  DenseCost cost{{30000, 31000}, 0.152, 0.164, {0.42, 0.17}, 0.55};
  if (dtype == DType::f64) cost = {{20000, 20000}, 0.9, 0.9, {0.5, 0.5}, 1}; // by plain matrix products
  if (dtype == DType::bf16) cost = {{45000, 31000}, 0.081, 0.100, {0.30, 0.014}, 0.33};
  if (dtype == DType::bf16 && !processor().dots) cost.forward = cost.backward = 0.160;
  if (dtype == DType::f16) cost.element[0] += 0.6, cost.element[1] += 0.6; // converted to float32 and back
  if ((dtype == DType::bf16 || dtype == DType::f16) && tiles) cost.forward = cost.backward = 0.025;
  cost.forward *= halved().dense, cost.backward *= halved().dense;
  return cost;
}

enum class ConvPass { forward, grad_input, grad_weight };

inline double dense_call(const ConvWork& work) {
  return dense_cost(work.conv.dtype).call[work.x_channels_last && work.y_channels_last];
}

inline double dense_cost(const ConvWork& work, ConvPass pass) {
  const Conv2d& conv = work.conv;
  const DenseCost cost = dense_cost(conv.dtype);
  const bool back = pass == ConvPass::grad_input;
  const int64_t from = back ? conv.O : conv.C, to = back ? conv.C : conv.O;
  // oneDNN fills up to 16 channels, as the kernels do.
  const double vectors = conv.dtype == DType::f64 ? double(to) / 16 : double((to + 15) / 16);
  const double products = double(conv.B * conv.OH * conv.OW * from * conv.KH * conv.KW) * vectors;
  return dense_call(work) + products * (pass == ConvPass::forward ? cost.forward : cost.backward) +
         work.x_elements() * cost.element[work.x_channels_last] + work.y_elements() * cost.element[work.y_channels_last] +
         work.weights() * cost.weight;
}

constexpr double kMargin = 0.85; // of the dense way's cost: nearer to it the kernels are slower as often as not

inline bool sparse_forward_pays(const ConvWork& work, double active) {
  return work.sparse_possible() &&
         sparse_cost(work, false, active) < kMargin * dense_cost(work, ConvPass::forward);
}

// How the input's gradient and the weight's are taken, and what that takes.
struct ConvWays {
  ConvWay input, weight;
  double cost;
};

inline ConvWays dense_backward_ways(const ConvWork& work, bool want_input, bool want_weight) {
  const double input = want_input ? dense_cost(work, ConvPass::grad_input) : 0;
  const double weight = want_weight ? dense_cost(work, ConvPass::grad_weight) : 0;
  // Both at once take one call of oneDNN, which lays grad_y out once.
  const double shared = want_input && want_weight ? dense_call(work) : 0;
  return {ConvWay::dense, ConvWay::dense, input + weight - shared};
}

// grad_x by grad_y, or, if wanted at the non-zeros of x alone, by x; grad_weight by either, and by x together with grad_x. Costs
// of the kernels' count as kMargin says.
inline ConvWays backward_ways(const ConvWork& work, double x_active, double grad_active, bool at_nonzeros, bool want_input,
                              bool want_weight) {
  ConvWays fastest = dense_backward_ways(work, want_input, want_weight);
  if (!work.sparse_possible()) return fastest;
  const auto consider = [&](ConvWay input, ConvWay weight, double cost) {
    if (cost < fastest.cost) fastest = {input, weight, cost};
  };
  const auto by_x = [&](const ListCost& cost) { return list_cost(work, cost, false, x_active) / kMargin; };
  ConvWay input = ConvWay::by_grad, weight = ConvWay::by_grad;
  double input_cost = 0, weight_cost = 0;
  if (want_input) {
    input_cost = sparse_cost(work, true, grad_active) / kMargin;
    if (const double cost = by_x(kValueCost); at_nonzeros && cost < input_cost) input = ConvWay::by_x, input_cost = cost;
  }
  if (want_weight) {
    weight_cost = list_cost(work, kWeightCost, true, grad_active) / kMargin;
    if (const double cost = by_x(kWeightCost); cost < weight_cost) weight = ConvWay::by_x, weight_cost = cost;
  }
  consider(input, weight, input_cost + weight_cost);
  if (want_input && want_weight) {
    if (at_nonzeros) consider(ConvWay::by_x, ConvWay::by_x, by_x(kBothCost));
    consider(ConvWay::dense, weight, dense_cost(work, ConvPass::grad_input) + weight_cost);
    consider(input, ConvWay::dense, input_cost + dense_cost(work, ConvPass::grad_weight));
  }
  return fastest;
}

// Whether PyTorch's own autograd node had better do all passes of a training step: where the dense way is not much slower for
// a dense gradient, and calling a Python function, which takes 40 to 60 us more than that node, would be a twentieth of the
// step. Of longer ones sparse gradients might save more.
// x_active(): asked for last, as it takes 10 us and more where x has left the caches.
template <class F> bool all_dense_pays(const ConvWork& work, const F& x_active, bool want_input) {
  const double function = halved().rest * 20000, longest = halved().dense * 1200000; // beside what kMargin leaves
  const double forward = dense_cost(work, ConvPass::forward);
  const double dense = forward + dense_backward_ways(work, want_input, true).cost;
  if (dense > longest) return false;
  const double active = x_active();
  const double sparse = sparse_forward_pays(work, active) ? sparse_cost(work, false, active) / kMargin : forward;
  return dense < sparse + backward_ways(work, active, 1, false, want_input, true).cost + function;
}

} // namespace sparsekern
