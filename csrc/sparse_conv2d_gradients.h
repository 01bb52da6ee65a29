// Gradients by the passes of the convolution itself: of the weight, and of the input where it is not zero.
#pragma once
#include "sparse_conv2d_pack.h"
#include "sparse_conv2d_passes.h"

namespace sparsekern {
namespace {

// One sample of the result's gradient, `lanes` channels of it from `first` on, laid out as sums; 0 where no result is.
template <class T>
void lay_out(const Plan& plan, const int32_t* place, const T* from /* channels last */, int64_t first, acc_t<T>* sums,
             int64_t sums_size) {
  const View& view = plan.result;
  const int64_t row_size = plan.phase_count * plan.width * plan.lanes;
  std::memset(sums, 0, size_t(sums_size) * sizeof(acc_t<T>));
  for (int64_t c = first; c < min(first + plan.lanes, view.channels); c += kLanes) {
    const int64_t n = min(kLanes, view.channels - c);
    const T* p = from + c;
    for (int64_t row = 0; row < view.rows; row++)
      for (int64_t column = 0; column < view.columns; column++, p += view.channels)
        store(sums + row * row_size + place[column] + c - first, load_first(p, n));
  }
}

// Kernel rows of all panels: what a call of grad_weight works for.
int64_t weight_rows(const Conv2d& conv, bool by_grad) { return make_plan(conv, by_grad).panels() * conv.KH; }

// Writes one kernel row of one panel's sums (group, source channel, tap, lanes) to grad_weight (O, C, KH, KW), or
// (O, KH, KW, C) in memory.
template <class T>
void unpack_row(const Conv2d& conv, const Plan& plan, const acc_t<T>* sums, int64_t panel, int64_t kh, Images grad_weight) {
  const int64_t taps = conv.KH * conv.KW, first = panel * plan.lanes;
  const int64_t n = min(plan.lanes, plan.result.channels - first);
  const int64_t filter_step = conv.C * taps, tap_step = grad_weight.channels_last ? conv.C : 1;
  const int64_t channel_step = grad_weight.channels_last ? 1 : taps;
  const int64_t result_step = plan.transposed ? channel_step : filter_step;
  const int64_t source_step = plan.transposed ? filter_step : channel_step;
  T* out = static_cast<T*>(grad_weight.data) + first * result_step;
  for (int g = 0; g < plan.group_count; g++) {
    const Group& group = plan.groups[g];
    for (int64_t channel = 0; channel < plan.source.channels; channel++)
      for (int64_t t = 0; t < group.taps; t++, sums += plan.lanes) {
        T* to = out + channel * source_step + (kh * conv.KW + group.kw + t * group.kw_step) * tap_step;
        for (int64_t l = 0; l < n; l++) from_acc(sums[l], to[l * result_step]);
      }
  }
}

// Rows first..first+rows of weight_rows. The lists are of x, or of grad_y if by_grad; the other one is dense.
void grad_weight(const Conv2d& conv, bool by_grad, Images grad_y, Images x, Images out, int64_t first, int64_t rows) {
  Plan plan = make_plan(conv, by_grad);
  const Images source = by_grad ? grad_y : x, result = by_grad ? x : grad_y;
  plan.source.channel_stride = View(plan.source.channels, plan.source.rows, plan.source.columns, source.channels_last).channel_stride;
  plan.result.channel_stride = View(plan.result.channels, plan.result.rows, plan.result.columns, result.channels_last).channel_stride;
  dispatch(conv.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const Workspace<T> space(plan);
    const int64_t size = plan.taps * plan.source.channels * plan.lanes, end = first + rows;
    A* sums = static_cast<A*>(scratch(0, size_t(rows * size) * sizeof(A)));
    T* image = static_cast<T*>(scratch(8, size_t(plan.result.size()) * sizeof(T)));
    std::memset(sums, 0, size_t(rows * size) * sizeof(A));
    for (int64_t b0 = 0; b0 < conv.B; b0 += space.at_once) {
      const int64_t samples = min(space.at_once, conv.B - b0);
      for (int64_t b = 0; b < samples; b++) {
        const T* from = static_cast<const T*>(source.data) + (b0 + b) * plan.source.size();
        compress(channels_last(from, plan.source, space.image), plan.source, plan.block, plan.pad, plan.pitch,
                 space.lists(b));
      }
      for (int64_t row = first; row < end; row++) {
        if (row == first || row % conv.KH == 0)
          for (int64_t b = 0; b < samples; b++) {
            const T* from = static_cast<const T*>(result.data) + (b0 + b) * plan.result.size();
            lay_out(plan, space.place, channels_last(from, plan.result, image), row / conv.KH * plan.lanes,
                    space.sums + b * space.sums_size, space.sums_size);
          }
        pass_samples<Pass::weight>(conv, plan, space, samples, row % conv.KH, sums + (row - first) * size);
      }
    }
    for (int64_t row = first; row < end; row++)
      unpack_row<T>(conv, plan, sums + (row - first) * size, row / conv.KH, row % conv.KH, out);
  });
}

// Writes one sample of grad_x: the sums of each non-zero of x, 0 elsewhere.
template <class T>
void write_values(const Plan& plan, const Lists<acc_t<T>>& lists, const acc_t<T>* value_sums, T* out) {
  using A = acc_t<T>;
  const View& view = plan.source;
  std::memset(out, 0, size_t(view.size()) * sizeof(T));
  const int32_t* start = lists.start;
  for (int64_t c = 0; c < view.channels; c += plan.block)
    for (int64_t row = 0; row < view.rows; row++, start += plan.pitch)
      for (int64_t column = 0; column < view.columns; column++)
        for (int64_t i = start[plan.pad + column]; i < start[plan.pad + column + 1]; i++) {
          A parts[kRegLanes<A>];
          std::memcpy(parts, value_sums + i * kRegLanes<A>, sizeof parts);
          for (int w = kRegLanes<A> / 2; w > 0; w /= 2)
            for (int l = 0; l < w; l++) parts[l] += parts[l + w];
          from_acc(parts[0], out[(row * view.columns + column) * view.pixel_stride +
                                 (c + lists.channel[i]) * view.channel_stride]);
        }
}

// grad_x where x is not zero, 0 elsewhere, from a dense grad_y.
void grad_input_at_nonzeros(const Conv2d& conv, Images grad_y, Images x, void* packed, void* grad_x,
                            int64_t first_sample, int64_t count) {
  Plan plan = make_plan(conv, false);
  plan.source = View(conv.C, conv.H, conv.W, x.channels_last);
  plan.result = View(conv.O, conv.OH, conv.OW, grad_y.channels_last);
  dispatch(conv.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const Workspace<T> space(plan, true);
    T* image = static_cast<T*>(scratch(8, size_t(plan.result.size()) * sizeof(T)));
    const int64_t end = first_sample + count;
    for (int64_t b0 = first_sample; b0 < end; b0 += space.at_once) {
      const int64_t samples = min(space.at_once, end - b0);
      for (int64_t b = 0; b < samples; b++) {
        const T* from = static_cast<const T*>(x.data) + (b0 + b) * plan.source.size();
        const Lists<A> lists = space.lists(b);
        compress(channels_last(from, plan.source, space.image), plan.source, plan.block, plan.pad, plan.pitch, lists);
        const int32_t entries = lists.start[plan.blocks() * plan.source.rows * plan.pitch - 1];
        std::memset(space.value_sums + b * space.size * kRegLanes<A>, 0, size_t(entries) * kRegLanes<A> * sizeof(A));
      }
      for (int64_t panel = 0; panel < plan.panels(); panel++) {
        for (int64_t b = 0; b < samples; b++) {
          const T* from = static_cast<const T*>(grad_y.data) + (b0 + b) * plan.result.size();
          lay_out(plan, space.place, channels_last(from, plan.result, image), panel * plan.lanes,
                  space.sums + b * space.sums_size, space.sums_size);
        }
        for (int64_t kh = 0; kh < conv.KH; kh++)
          pass_samples<Pass::value>(conv, plan, space, samples, kh,
                                    static_cast<A*>(packed) + plan.slice(panel, kh, 0));
      }
      for (int64_t b = 0; b < samples; b++)
        write_values(plan, space.lists(b), space.value_sums + b * space.size * kRegLanes<A>,
                     static_cast<T*>(grad_x) + (b0 + b) * plan.source.size());
    }
  });
}

} // namespace
} // namespace sparsekern
