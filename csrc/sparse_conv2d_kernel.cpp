// Forward and input gradient of the sparse-input convolution: each non-zero adds its weights to the outputs it reaches.
// The innermost kernel keeps a segment of one output row times 16 channels in registers and walks over the pixels of one
// input row, for some taps of one kernel row, so that their weights (channels x taps x 16) stay in L1.
#include "sparse_conv2d_rows.h"

#include "sparse_conv2d_grad_weight.h"

namespace sparsekern {
namespace {

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t count(DType dtype, const void* data, int64_t n) {
  int64_t total = 0;
  dispatch(dtype, [&]<class T>() {
    const T* x = static_cast<const T*>(data);
    for (int64_t i = 0; i < n; i++) total += to_acc(x[i]) != 0;
  });
  return total;
}

void keep(DType dtype, const void* mask, void* data, int64_t n) {
  dispatch(dtype, [&]<class T>() {
    const T* m = static_cast<const T*>(mask);
    T* x = static_cast<T*>(data);
    for (int64_t i = 0; i < n; i++) x[i] = to_acc(m[i]) != 0 ? x[i] : T{};
  });
}

size_t packed_bytes(const Conv2d& conv, bool transposed) {
  const Plan plan = make_plan(conv, transposed);
  return size_t(plan.panels() * plan.panel_size()) * (conv.dtype == DType::f64 ? 8 : 4);
}

template <class T>
void pack(const Conv2d& conv, const Plan& plan, const T* weight, const int64_t* stride, acc_t<T>* packed,
          int64_t first_panel, int64_t panels) {
  const int64_t stride_in = stride[plan.transposed ? 0 : 1], stride_out = stride[plan.transposed ? 1 : 0];
  for (int64_t panel = first_panel; panel < first_panel + panels; panel++)
    for (int64_t kh = 0; kh < conv.KH; kh++)
      for (int g = 0; g < plan.group_count; g++) {
        const Group& group = plan.groups[g];
        acc_t<T>* to = packed + plan.slice(panel, kh, g);
        for (int64_t c = 0; c < plan.source.channels; c++)
          for (int64_t t = 0; t < group.taps; t++, to += kLanes)
            for (int64_t l = 0; l < kLanes; l++) {
              const int64_t out = panel * kLanes + l, kw = group.kw + t * group.kw_step;
              to[l] = out >= plan.result.channels ? 0
                  : to_acc(weight[c * stride_in + out * stride_out + kh * stride[2] + kw * stride[3]]);
            }
      }
}

void pack(const Conv2d& conv, bool transposed, const void* weight, const int64_t stride[4], void* packed,
          int64_t first_panel, int64_t panels) {
  const Plan plan = make_plan(conv, transposed);
  dispatch(conv.dtype, [&]<class T>() {
    pack(conv, plan, static_cast<const T*>(weight), stride, static_cast<acc_t<T>*>(packed), first_panel, panels);
  });
}

// Adds one slice of the weights to the sums of one sample.
template <class A>
void add_slice(const Conv2d& conv, const Plan& plan, int64_t kh, const Group& group, const Lists<A>& lists,
               const A* weight, A* sums) {
  const row_fn<A> add_row = find_row<A>(plan.segment, group.taps);
  for (int64_t row = 0; row < plan.result.rows; row++) {
    const int64_t source_row = plan.source_row(conv, row, kh);
    if (source_row < 0 || source_row >= plan.source.rows) continue;
    const int32_t* start = lists.start + source_row * plan.pitch + group.column;
    A* to = sums + (row * plan.phase_count + group.phase) * plan.width * kLanes;
    for (int64_t i = 0; i < plan.width; i += plan.segment)
      add_row(lists.value, lists.channel, start + i * plan.step, plan.step, weight, to + i * kLanes);
  }
}

// Writes one panel of one sample: sums (rows, phases, width, 16) to 16 channels of every pixel.
template <class T>
void finish(const Plan& plan, const acc_t<T>* sums, const acc_t<T>* bias, const T* mask, T* out, int64_t panel) {
  const View& view = plan.result;
  const int64_t channels = min(kLanes, view.channels - panel * kLanes);
  for (int64_t row = 0; row < view.rows; row++)
    for (int64_t p = 0; p < plan.phase_count; p++) {
      const Phase& phase = plan.phases[p];
      for (int64_t i = 0; i < phase.count; i++) {
        const acc_t<T>* from = sums + ((row * plan.phase_count + p) * plan.width + i) * kLanes;
        const int64_t pixel = row * view.columns + phase.first + i * plan.phase_count;
        for (int64_t l = 0; l < channels; l++) {
          const int64_t at = pixel * view.pixel_stride + (panel * kLanes + l) * view.channel_stride;
          if (mask != nullptr && to_acc(mask[at]) == 0) out[at] = T{};
          else from_acc(from[l] + bias[l], out[at]);
        }
      }
    }
}

template <class T>
void run(const Conv2d& conv, const Plan& plan, Images source, const acc_t<T>* packed, const T* bias, const T* mask,
         Images result, Part part) {
  using A = acc_t<T>;
  // As many samples at a time as let a slice of weights be read from L2 rarely and the lists stay in L2.
  const int64_t size = plan.source.size(), at_once = max(1, min(8, 131072 / max(size, 1)));
  const int64_t starts = plan.source.rows * plan.pitch;
  const int64_t sums_size = plan.result.rows * plan.phase_count * plan.width * kLanes;
  A* values = static_cast<A*>(scratch(1, size_t(at_once * (size + kLanes)) * sizeof(A)));
  int32_t* channels = static_cast<int32_t*>(scratch(2, size_t(at_once * (size + kLanes)) * 4));
  int32_t* start = static_cast<int32_t*>(scratch(3, size_t(at_once * starts) * 4));
  A* sums = static_cast<A*>(scratch(4, size_t(at_once * sums_size) * sizeof(A)));
  const T* from = static_cast<const T*>(source.data);
  T* to = static_cast<T*>(result.data);

  const int64_t end = part.first_sample + part.samples;
  for (int64_t b0 = part.first_sample; b0 < end; b0 += at_once) {
    const int64_t samples = min(at_once, end - b0);
    const auto lists = [&](int64_t b) {
      return Lists<A>{values + b * (size + kLanes), channels + b * (size + kLanes), start + b * starts};
    };
    for (int64_t b = 0; b < samples; b++) compress(from + (b0 + b) * size, plan.source, plan.pad, plan.pitch, lists(b));
    for (int64_t panel = part.first_panel; panel < part.first_panel + part.panels; panel++) {
      A start_value[kLanes] = {};
      for (int64_t l = 0; bias != nullptr && l < min(kLanes, plan.result.channels - panel * kLanes); l++)
        start_value[l] = to_acc(bias[panel * kLanes + l]);
      std::memset(sums, 0, size_t(samples * sums_size) * sizeof(A));
      for (int64_t kh = 0; kh < conv.KH; kh++)
        for (int g = 0; g < plan.group_count; g++)
          for (int64_t b = 0; b < samples; b++)
            add_slice(conv, plan, kh, plan.groups[g], lists(b), packed + plan.slice(panel, kh, g), sums + b * sums_size);
      for (int64_t b = 0; b < samples; b++)
        finish(plan, sums + b * sums_size, start_value, mask == nullptr ? nullptr : mask + (b0 + b) * plan.result.size(),
               to + (b0 + b) * plan.result.size(), panel);
    }
  }
}

void forward(const Conv2d& conv, Images x, const void* packed, const void* bias, Images y, Part part) {
  Plan plan = make_plan(conv, false);
  plan.source = View(conv.C, conv.H, conv.W, x.channels_last);
  plan.result = View(conv.O, conv.OH, conv.OW, y.channels_last);
  dispatch(conv.dtype, [&]<class T>() {
    run<T>(conv, plan, x, static_cast<const acc_t<T>*>(packed), static_cast<const T*>(bias), nullptr, y, part);
  });
}

void grad_input(const Conv2d& conv, Images grad_y, const void* packed, const void* mask, Images grad_x, Part part) {
  Plan plan = make_plan(conv, true);
  plan.source = View(conv.O, conv.OH, conv.OW, grad_y.channels_last);
  plan.result = View(conv.C, conv.H, conv.W, grad_x.channels_last);
  dispatch(conv.dtype, [&]<class T>() {
    run<T>(conv, plan, grad_y, static_cast<const acc_t<T>*>(packed), nullptr, static_cast<const T*>(mask), grad_x, part);
  });
}

} // namespace

extern const SparseConv2dKernels SPARSEKERN_TABLE(sparse_conv2d) = {
    count, keep, packed_bytes, pack, forward, grad_input, grad_weight_by_grad, grad_weight_by_input};

} // namespace sparsekern
