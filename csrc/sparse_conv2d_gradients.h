// Gradients over the non-zeros of one image, channel by channel: of the weight, and of the input where it is not zero.
//
// A channel of the source has a row of taps for each panel of the other image: its weights and the sums of their gradient
// stay in registers while all its non-zeros pass. Each meets a window of the other image's panel, which is read once for
// both gradients.
#pragma once
#include "sparse_conv2d_channels.h"
#include "sparse_conv2d_pack.h"

namespace sparsekern {
namespace {

// Of a panel: so much of it as passes at a time stays in the first-level cache, or, of more samples for longer lists, in the
// second.
constexpr int64_t kBandBytes = 24576, kPanelBytes = 131072;

constexpr int kSums = 4; // of an entry, which are added last

// The first four of 16, 8 or 4 neighbouring sums.
template <class A> SPARSEKERN_INLINE void add_sums(A* to, reg<A> v) {
  typedef A four __attribute__((vector_size(kSums * sizeof(A))));
  four sum, part;
  std::memcpy(&sum, to, sizeof sum);
  if constexpr (kRegLanes<A> == 16) {
    typedef A eight __attribute__((vector_size(8 * sizeof(A))));
    const eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    part = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else if constexpr (kRegLanes<A> == 8) {
    part = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else if constexpr (kRegLanes<A> == 4) {
    part = v;
  } else {
    part = four{v[0], v[1], 0, 0};
  }
  sum += part;
  std::memcpy(to, &sum, sizeof sum);
}

// The registers for the weights and the sums of a pass, beside a value, a window's, and two sums where there are weights.
#if defined(__AVX512F__)
constexpr int most_registers(bool both) { return both ? 28 : 30; }
#else
constexpr int most_registers(bool both) { return both ? 12 : 14; }
#endif

// How many parts (kernel rows, or panels) a pass takes together, of so many registers each.
constexpr int most_parts(int regs, bool both) {
  const int fit = most_registers(both) / (both ? 2 * regs : regs);
  return fit < 1 ? 1 : fit > 8 ? 8 : fit;
}

// How many of a panel's registers it takes at once.
constexpr int most_at_once(int taps, int regs, bool both) {
  while (regs > 1 && taps * regs * (both ? 2 : 1) > most_registers(both)) regs /= 2;
  return regs;
}

// Slices of the weights, or of the sums of their gradient, of one channel and one group of taps: of each part.
template <class A> struct Slices {
  A* data;
  int64_t step;
};

// Entries of one channel, one group of taps and some parts, kRegs registers each: gradient += value * window, and
// sums += weight * window. step: from a part's panel, or row of it, to the next.
template <bool kWeight, bool kValue, class A, int kRegs, int kTaps, int kParts>
void pass_windows(const int32_t* offset, const A* value, A* sums, int64_t n, const A* panel, int64_t step,
                  Slices<const A> weight, Slices<A> gradient) {
  constexpr int kWidth = kRegLanes<A>, kAtOnce = most_at_once(kTaps, kRegs, kWeight && kValue), kPart = kTaps * kAtOnce;
  for (int r = 0; r < kRegs; r += kAtOnce, weight.data += kAtOnce * kWidth * kValue, gradient.data += kAtOnce * kWidth * kWeight) {
    reg<A> w[kParts][kPart], grad[kParts][kPart];
#pragma GCC unroll 32
    for (int i = 0; i < kParts * kPart; i++) {
      const int part = i / kPart, at = (i % kPart / kAtOnce * kRegs + i % kAtOnce) * kWidth;
      if (kValue) w[part][i % kPart] = load_reg(weight.data + part * weight.step + at);
      if (kWeight) grad[part][i % kPart] = load_reg(gradient.data + part * gradient.step + at);
    }
    for (int64_t e = 0; e < n; e++) {
      const A* window = panel + offset[e] + r * kWidth;
      const reg<A> v = value[e] - reg<A>{};
      reg<A> sum[2] = {}; // two, so that additions wait less for each other
#pragma GCC unroll 8
      for (int part = 0; part < kParts; part++)
#pragma GCC unroll 16
        for (int i = 0; i < kPart; i++) {
          reg<A> other = load_reg(window + part * step + (i % kAtOnce - i / kAtOnce * kRegs) * kWidth);
          if (kWeight && kValue) keep_in_register(other); // GCC would load it for each of its two uses
          if (kWeight) grad[part][i] = fma_reg(v, other, grad[part][i]);
          if (kValue) sum[i % 2] = fma_reg(w[part][i], other, sum[i % 2]);
        }
      if (kValue) add_sums(sums + e * kSums, sum[0] + sum[1]);
    }
    if (kWeight)
#pragma GCC unroll 32
      for (int i = 0; i < kParts * kPart; i++)
        store_reg(gradient.data + i / kPart * gradient.step + (i % kPart / kAtOnce * kRegs + i % kAtOnce) * kWidth,
                  grad[i / kPart][i % kPart]);
  }
}

template <class A>
using windows_fn = void (*)(const int32_t*, const A*, A*, int64_t, const A*, int64_t, Slices<const A>, Slices<A>);

template <bool kWeight, bool kValue, class A, int kRegs, int kTaps, int kParts = 1> windows_fn<A> find_parts(int64_t parts) {
  if constexpr (kParts < most_parts(kTaps * kRegs, kWeight && kValue))
    if (parts > kParts) return find_parts<kWeight, kValue, A, kRegs, kTaps, kParts + 1>(parts);
  return pass_windows<kWeight, kValue, A, kRegs, kTaps, kParts>;
}

template <bool kWeight, bool kValue, class A, int kRegs> windows_fn<A> find_taps(int taps, int64_t parts) {
  switch (taps) {
    case 1: return find_parts<kWeight, kValue, A, kRegs, 1>(parts);
    case 2: return find_parts<kWeight, kValue, A, kRegs, 2>(parts);
    case 3: return find_parts<kWeight, kValue, A, kRegs, 3>(parts);
    case 4: return find_parts<kWeight, kValue, A, kRegs, 4>(parts);
    default: return find_parts<kWeight, kValue, A, kRegs, 5>(parts);
  }
}

template <class A, int kRegs> windows_fn<A> find_windows(bool of_weight, bool of_value, int taps, int64_t parts) {
  if (!of_value) return find_taps<true, false, A, kRegs>(taps, parts);
  return of_weight ? find_taps<true, true, A, kRegs>(taps, parts) : find_taps<false, true, A, kRegs>(taps, parts);
}

template <class A> windows_fn<A> find_windows(bool of_weight, bool of_value, int64_t lanes, int taps, int64_t parts) {
  constexpr int kOne = kLanes / kRegLanes<A>;
  return lanes == kLanes ? find_windows<A, kOne>(of_weight, of_value, taps, parts)
                         : find_windows<A, kMaxPanels<A> * kOne>(of_weight, of_value, taps, parts);
}

// Up to 16 rows, `stride` apart, n elements each, from sums that hold element j of all rows at list[j].
template <class T>
void unpack_rows(const acc_t<T>* sums, const int64_t* list, int64_t n, int64_t rows, T* out, int64_t stride) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = min(kLanes, n - j);
    vec<acc_t<T>> v[kLanes] = {};
    for (int64_t i = 0; i < count; i++) v[i] = load(sums + list[j + i]);
    transpose(v);
    for (int64_t l = 0; l < rows; l++) store_first(out + l * stride + j, v[l], count);
  }
}

// Writes the sums of one panel, of `channels` channels of the source from `first` on, to grad_weight (O, C, KH, KW), or
// (O, KH, KW, C) in memory if channels_last. list: room for the elements of those channels and one of the panel's.
template <class T>
void unpack_panel(const Conv2d& conv, const Windows& windows, const Places& places, const acc_t<T>* sums, int64_t panel,
                  int64_t first, int64_t channels, int64_t* list, T* grad_weight, bool channels_last) {
  const int64_t taps = conv.KH * conv.KW;
  channels_last |= taps == 1; // both at once
  for (int64_t lane = 0; lane < windows.lanes; lane += kLanes, sums += kLanes) {
    const int64_t at = panel * windows.lanes + lane, n = min(kLanes, windows.other.channels - at);
    if (!windows.rows.by_grad) { // the panel's channels are the weight's O, the source's its C
      T* filters = grad_weight + at * conv.C * taps;
      list_places(places, 0, channels, conv.KH, conv.KW, channels_last, list);
      if (channels_last)
        for (int64_t t = 0; t < taps; t++)
          unpack_rows(sums, list + t * channels, channels, n, filters + t * conv.C + first, conv.C * taps);
      else
        unpack_rows(sums, list, channels * taps, n, filters + first * taps, conv.C * taps);
      continue;
    }
    for (int64_t c = 0; c < channels; c++) {
      T* filter = grad_weight + (first + c) * conv.C * taps + at * (channels_last ? 1 : taps);
      list_places(places, c, 1, conv.KH, conv.KW, false, list);
      if (channels_last)
        for (int64_t t = 0; t < taps; t++) store_first(filter + t * conv.C, load(sums + list[t]), n);
      else
        unpack_rows(sums, list, taps, n, filter, taps);
    }
  }
}

// Writes one sample of the source's gradient: the sums of each of its non-zeros, 0 elsewhere. pixel: of a place in a panel,
// for the first phases.
template <class T>
void write_values(const Windows& windows, const ChannelLists<acc_t<T>>& lists, int64_t sample, const acc_t<T>* sums,
                  const int32_t* pixel, ChannelPart part, T* out) {
  using A = acc_t<T>;
  const View& view = windows.source;
  if (part.channels == view.channels) {
    std::memset(out, 0, size_t(view.size()) * sizeof(T));
  } else if (view.channel_stride == 1) {
    for (int64_t p = 0; p < view.pixels(); p++)
      std::memset(out + p * view.pixel_stride + part.first, 0, size_t(part.channels) * sizeof(T));
  } else {
    std::memset(out + part.first * view.pixels(), 0, size_t(part.channels * view.pixels()) * sizeof(T));
  }
  const int lane_bits = __builtin_ctzll(uint64_t(windows.lanes));
  const int32_t base = int32_t(sample * windows.panel_size());
  for (int64_t list = 0; list < lists.count; list++)
    for (int64_t phase = 0; phase < windows.rows.phases(); phase++) {
      const int64_t first_pixel = phase * view.columns + list % lists.phases;
      T* to = out + (part.first + list / lists.phases) * view.channel_stride + first_pixel * view.pixel_stride;
      const int64_t end = lists.at(sample, windows.row_start[phase + 1], list);
      for (int64_t i = lists.at(sample, windows.row_start[phase], list); i < end; i++) {
        const A* sum = sums + i * kSums;
        from_acc((sum[0] + sum[1]) + (sum[2] + sum[3]),
                 to[pixel[(lists.offset[i] - base) >> lane_bits] * view.pixel_stride]);
      }
    }
}

template <class T>
void gradients_of(const Conv2d& conv, const Windows& windows, Images source, Images other, const acc_t<T>* packed,
                  Images grad_weight, T* grad_x, ChannelPart part) {
  using A = acc_t<T>;
  const int64_t lanes = windows.lanes, taps = conv.KH * conv.KW, row_size = windows.width * lanes;
  const bool by_grad = windows.rows.by_grad, of_weight = grad_weight.data != nullptr, of_value = grad_x != nullptr;
  const int64_t panel_size = windows.panel_size(), panel_bytes = int64_t(max(panel_size, 1) * sizeof(A));
  const int64_t at_once = max(1, min(8, (by_grad ? kPanelBytes : kBandBytes) / panel_bytes)), stride = at_once * panel_size;
  const int64_t band = at_once > 1 ? windows.height : max(1, kBandBytes / int64_t(max(row_size, 1) * sizeof(A)));
  const int most = most_parts(int(windows.most_taps() * lanes / kRegLanes<A>), of_weight && of_value);
  const bool by_rows = by_grad && conv.KH > 1; // parts
  const int64_t rows_at_once = by_rows ? most : 1, panels_at_once = by_rows ? 1 : most;
  const ChannelLists<A> lists(windows, part.channels, at_once);
  A* panels = static_cast<A*>(scratch(4, size_t(windows.panels() * stride) * sizeof(A)));
  A *value_sums = nullptr, *sums = nullptr;
  int32_t* pixel = nullptr;
  if (of_value) {
    const int64_t entries = at_once * part.channels * windows.source.pixels(), places = (conv.H - 1 + conv.PH) / conv.SH + 1;
    value_sums = static_cast<A*>(scratch(7, size_t(entries * kSums) * sizeof(A)));
    pixel = static_cast<int32_t*>(scratch(6, size_t(places * windows.width) * sizeof(int32_t)));
    for (int64_t r = 0; r < places; r++)
      for (int64_t c = 0; c < windows.width; c++)
        pixel[r * windows.width + c] = int32_t((r * conv.SH - conv.PH) * conv.W + (c - windows.left) * conv.SW - conv.PW);
  }
  if (of_weight) {
    const size_t n = size_t(windows.panels() * taps * part.channels * lanes);
    sums = static_cast<A*>(scratch(8, n * sizeof(A)));
    std::memset(sums, 0, n * sizeof(A));
  }
  // Entries of all lists from (sample, row) on to before (end sample, end row), by some parts from a panel and kh on.
  const auto pass = [&](const Group& group, int64_t before, int64_t panel, int64_t kh, int64_t parts, int64_t sample,
                        int64_t row, int64_t end_sample, int64_t end_row) {
    const windows_fn<A> pass_windows = find_windows<A>(of_weight, of_value, lanes, group.taps, parts);
    const int64_t slice = ((panel * conv.KH + kh) * conv.KW + before) * lanes, each = group.taps * lanes;
    const int64_t slices = (by_rows ? conv.KW : taps) * lanes; // of a channel, from a part to the next
    const A* from = panels + panel * stride + windows.rows.shift(kh) * row_size + group.column * lanes;
    for (int64_t c = 0; c < part.channels; c++) {
      const int64_t list = c * lists.phases + group.phase, first = lists.at(sample, row, list);
      const int64_t n = lists.at(end_sample, end_row, list) - first;
      if (n == 0) continue;
      Slices<const A> weight{nullptr, slices * windows.source.channels};
      Slices<A> gradient{nullptr, slices * part.channels};
      if (of_value) weight.data = packed + slice * windows.source.channels + (part.first + c) * each;
      if (of_weight) gradient.data = sums + slice * part.channels + c * each;
      pass_windows(lists.offset + first, lists.value + first, of_value ? value_sums + first * kSums : nullptr, n, from,
                   by_rows ? row_size : stride, weight, gradient);
    }
  };
  const int64_t end = part.first_sample + part.samples;
  for (int64_t b0 = part.first_sample; b0 < end; b0 += at_once) {
    const int64_t samples = min(at_once, end - b0);
    clear_lists(windows, samples, lists);
    for (int64_t b = 0; b < samples; b++) {
      list_channels(static_cast<const T*>(source.data) + (b0 + b) * windows.source.size(), windows, part.first, b, lists);
      lay_out(static_cast<const T*>(other.data) + (b0 + b) * windows.other.size(), windows, panels + b * panel_size, stride);
    }
    if (of_value)
      for (int64_t list = 0; list < lists.count; list++) {
        const int64_t first = lists.at(0, 0, list), n = lists.next[list] - first;
        std::memset(value_sums + first * kSums, 0, size_t(n * kSums) * sizeof(A));
      }
    for (int64_t panel = 0; panel < windows.panels(); panel += panels_at_once)
      for (int64_t top = 0; top < windows.height; top += band)
        for (int64_t kh = 0; kh < conv.KH; kh += rows_at_once) {
          const int64_t parts = by_rows ? min(rows_at_once, conv.KH - kh) : min(panels_at_once, windows.panels() - panel);
          const int64_t first_row = windows.row_start[windows.rows.phase_of(kh)];
          // By grad_y all kernel rows meet the same rows, and all samples' entries are one stretch of a list.
          const int64_t tap = by_grad ? 0 : kh, shift = by_grad ? conv.PH : 0;
          const int64_t from = first_row + windows.rows.before(tap, top - shift);
          const int64_t to = first_row + windows.rows.before(tap, min(top + band, windows.height) - shift);
          int64_t before = 0;
          for (int g = 0; g < windows.group_count; before += windows.groups[g++].taps)
            if (by_grad) pass(windows.groups[g], before, panel, kh, parts, 0, from, samples - 1, to);
            else
              for (int64_t b = 0; b < samples; b++) pass(windows.groups[g], before, panel, kh, parts, b, from, b, to);
        }
    if (of_value)
      for (int64_t b = 0; b < samples; b++)
        write_values(windows, lists, b, value_sums, pixel, part, grad_x + (b0 + b) * windows.source.size());
  }
  if (!of_weight) return;
  const Places places(windows.groups, windows.group_count, part.channels, lanes);
  int64_t* list = static_cast<int64_t*>(scratch(1, size_t(max(part.channels, 1) * taps) * sizeof(int64_t)));
  for (int64_t panel = 0; panel < windows.panels(); panel++)
    unpack_panel(conv, windows, places, sums + panel * taps * part.channels * lanes, panel, part.first, part.channels, list,
                 static_cast<T*>(grad_weight.data), grad_weight.channels_last);
}

// Of grad_weight and of grad_x, laid out as x, what is not null: over the non-zeros of grad_y (grad_weight alone) or of x.
// packed: the weight as the forward reads it.
void gradients(const Conv2d& conv, bool by_grad, Images grad_y, Images x, const void* packed, Images grad_weight, void* grad_x,
               ChannelPart part) {
  const Windows windows = make_windows(conv, by_grad, x, grad_y);
  dispatch(conv.dtype, [&]<class T>() {
    gradients_of<T>(conv, windows, by_grad ? grad_y : x, by_grad ? x : grad_y, static_cast<const acc_t<T>*>(packed),
                    grad_weight, static_cast<T*>(grad_x), part);
  });
}

} // namespace
} // namespace sparsekern
