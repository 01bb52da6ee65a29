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
  for (int r = 0; r < kRegs; r += kAtOnce) {
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
      if (kValue) add_sums(sums + e * kEntrySums, sum[0] + sum[1]);
    }
    if (kWeight)
#pragma GCC unroll 32
      for (int i = 0; i < kParts * kPart; i++)
        store_reg(gradient.data + i / kPart * gradient.step + (i % kPart / kAtOnce * kRegs + i % kAtOnce) * kWidth,
                  grad[i / kPart][i % kPart]);
    if (kValue) weight.data += kAtOnce * kWidth;
    if (kWeight) gradient.data += kAtOnce * kWidth;
  }
}

template <class A>
using windows_fn = void (*)(const int32_t*, const A*, A*, int64_t, const A*, int64_t, Slices<const A>, Slices<A>);

template <bool kWeight, bool kValue, class A, int kRegs, int kTaps, int kParts = 1>
windows_fn<A> find_parts(int64_t parts) {
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

// Writes `channels` channels of the source, from `first` on, of the sums of one panel to grad_weight (O, C, KH, KW), or
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
      list_places(places, first, channels, conv.KH, conv.KW, channels_last, list);
      if (channels_last)
        for (int64_t t = 0; t < taps; t++)
          unpack_rows(sums, list + t * channels, channels, n, filters + t * conv.C + first, conv.C * taps);
      else
        unpack_rows(sums, list, channels * taps, n, filters + first * taps, conv.C * taps);
      continue;
    }
    for (int64_t c = 0; c < channels; c++) {
      T* filter = grad_weight + (first + c) * conv.C * taps + at * (channels_last ? 1 : taps);
      list_places(places, first + c, 1, conv.KH, conv.KW, false, list);
      if (channels_last)
        for (int64_t t = 0; t < taps; t++) store_first(filter + t * conv.C, load(sums + list[t]), n);
      else
        unpack_rows(sums, list, taps, n, filter, taps);
    }
  }
}

// Calls f(first, n) for the stretches of the sums (panel, kh, group, channel, tap, lanes) that some channels have.
template <class F>
void for_slices(const Conv2d& conv, const Windows& windows, int64_t first, int64_t channels, const F& f) {
  int64_t slice = 0;
  for (int64_t row = 0; row < windows.panels() * conv.KH; row++)
    for (int g = 0; g < windows.group_count; g++) {
      const int64_t each = windows.groups[g].taps * windows.lanes;
      f(slice + first * each, channels * each);
      slice += windows.source.channels * each;
    }
}

// A few samples at a time of a part's channels: in the calling thread's scratch.
template <class T> class GradientPasses {
  using A = acc_t<T>;

 public:
  // weight_sums: of grad_weight for all channels of the source, or null.
  GradientPasses(const Conv2d& conv, const Windows& windows, const A* packed, A* weight_sums, bool of_value,
                 ChannelPart part)
      : at_once(samples_at_once(windows)), conv_(conv), windows_(windows), part_(part), packed_(packed),
        panel_stride_(at_once * windows.panel_size()), sums_(weight_sums), lists_(windows, part.channels, at_once),
        panels_(static_cast<A*>(scratch(4, size_t(windows.panels() * panel_stride_) * sizeof(A)))) {
    if (of_value) {
      const int64_t entries = at_once * part.channels * windows.source.pixels();
      value_sums_ = static_cast<A*>(scratch(7, size_t(entries * kEntrySums) * sizeof(A)));
      list_pixels();
    }
    if (sums_ != nullptr)
      for_slices(conv, windows, part.first, part.channels, [&](int64_t first, int64_t n) {
        std::memset(sums_ + first, 0, size_t(n) * sizeof(A));
      });
  }

  const int64_t at_once; // samples

  // Up to so many samples of the source and of the other image, for add() and write_values().
  void take(const T* source, const T* other, int64_t samples) {
    samples_ = samples;
    clear_lists(windows_, samples, lists_);
    for (int64_t b = 0; b < samples; b++) {
      list_channels(source + b * windows_.source.size(), windows_, part_.first, b, lists_);
      lay_out(other + b * windows_.other.size(), windows_, panels_ + b * windows_.panel_size(), panel_stride_);
    }
    if (value_sums_ == nullptr) return;
    for (int64_t list = 0; list < lists_.count; list++) {
      const int64_t first = lists_.at(0, 0, list), n = lists_.next[list] - first;
      std::memset(value_sums_ + first * kEntrySums, 0, size_t(n * kEntrySums) * sizeof(A));
    }
  }

  // Adds all products of what was taken.
  void add() {
    const bool by_grad = windows_.rows.by_grad, by_rows = by_grad && conv_.KH > 1;
    const int64_t row_bytes = max(windows_.width * windows_.lanes, 1) * int64_t(sizeof(A));
    const int64_t band = at_once > 1 ? windows_.height : max(1, kBandBytes / row_bytes);
    const int most = most_parts(int(windows_.most_taps() * windows_.lanes / kRegLanes<A>), value_sums_ && sums_);
    const int64_t panels_at_once = by_rows ? 1 : most, rows_at_once = by_rows ? most : 1;
    for (int64_t panel = 0; panel < windows_.panels(); panel += panels_at_once)
      for (int64_t top = 0; top < windows_.height; top += band)
        for (int64_t kh = 0; kh < conv_.KH; kh += rows_at_once) {
          const int64_t parts = by_rows ? min(rows_at_once, conv_.KH - kh) : min(panels_at_once, windows_.panels() - panel);
          const int64_t first_row = windows_.row_start[windows_.rows.phase_of(kh)];
          // By grad_y all kernel rows meet the same rows, and all samples' entries are one stretch of a list.
          const int64_t tap = by_grad ? 0 : kh, shift = by_grad ? conv_.PH : 0;
          const int64_t from = first_row + windows_.rows.before(tap, top - shift);
          const int64_t to = first_row + windows_.rows.before(tap, min(top + band, windows_.height) - shift);
          int64_t before = 0;
          for (int g = 0; g < windows_.group_count; before += windows_.groups[g++].taps)
            if (by_grad) add_lists(windows_.groups[g], before, panel, kh, parts, {0, from}, {samples_ - 1, to});
            else
              for (int64_t b = 0; b < samples_; b++)
                add_lists(windows_.groups[g], before, panel, kh, parts, {b, from}, {b, to});
        }
  }

  // Writes the source's gradient at the samples that were taken: the sums of each non-zero, 0 elsewhere.
  void write_values(T* out) const {
    for (int64_t b = 0; b < samples_; b++) {
      clear_channels(out + b * windows_.source.size());
      write_sample(b, out + b * windows_.source.size());
    }
  }

 private:
  struct Row {
    int64_t sample, row;
  };

  static int64_t samples_at_once(const Windows& windows) {
    const int64_t bytes = windows.rows.by_grad ? kPanelBytes : kBandBytes;
    return max(1, min(8, bytes / (max(windows.panel_size(), 1) * int64_t(sizeof(A)))));
  }

  // The pixel of a place in a panel, for the first phases.
  void list_pixels() {
    const int64_t rows = (conv_.H - 1 + conv_.PH) / conv_.SH + 1, width = windows_.width;
    pixel_ = static_cast<int32_t*>(scratch(6, size_t(rows * width) * sizeof(int32_t)));
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++)
        pixel_[r * width + c] =
            int32_t((r * conv_.SH - conv_.PH) * conv_.W + (c - windows_.left) * conv_.SW - conv_.PW);
  }

  // The entries of all lists from one row on to before another one, by some parts from a panel and kernel row on.
  void add_lists(const Group& group, int64_t taps_before, int64_t panel, int64_t kh, int64_t parts, Row from, Row to) {
    const int64_t lanes = windows_.lanes, row_size = windows_.width * lanes, taps = conv_.KH * conv_.KW;
    const windows_fn<A> pass_windows = find_windows<A>(sums_ != nullptr, value_sums_ != nullptr, lanes, group.taps, parts);
    const bool by_rows = windows_.rows.by_grad && conv_.KH > 1;
    const int64_t slice = ((panel * conv_.KH + kh) * conv_.KW + taps_before) * lanes, each = group.taps * lanes;
    const int64_t next_slice = (by_rows ? conv_.KW : taps) * lanes; // of one channel
    const A* windows = panels_ + panel * panel_stride_ + windows_.rows.shift(kh) * row_size + group.column * lanes;
    for (int64_t c = 0; c < part_.channels; c++) {
      const int64_t list = c * lists_.phases + group.phase, first = lists_.at(from.sample, from.row, list);
      const int64_t n = lists_.at(to.sample, to.row, list) - first;
      if (n == 0) continue;
      const int64_t channels = windows_.source.channels, step = next_slice * channels;
      const int64_t at = slice * channels + (part_.first + c) * each;
      Slices<const A> weight{value_sums_ ? packed_ + at : nullptr, step};
      Slices<A> gradient{sums_ ? sums_ + at : nullptr, step};
      pass_windows(lists_.offset + first, lists_.value + first, value_sums_ ? value_sums_ + first * kEntrySums : nullptr, n,
                   windows, by_rows ? row_size : panel_stride_, weight, gradient);
    }
  }

  void clear_channels(T* out) const {
    const View& view = windows_.source;
    if (part_.channels == view.channels)
      std::memset(out, 0, size_t(view.size()) * sizeof(T));
    else if (view.channel_stride != 1)
      std::memset(out + part_.first * view.pixels(), 0, size_t(part_.channels * view.pixels()) * sizeof(T));
    else
      for (int64_t p = 0; p < view.pixels(); p++)
        std::memset(out + p * view.pixel_stride + part_.first, 0, size_t(part_.channels) * sizeof(T));
  }

  void write_sample(int64_t sample, T* out) const {
    const View& view = windows_.source;
    const int lane_bits = __builtin_ctzll(uint64_t(windows_.lanes));
    const int32_t base = int32_t(sample * windows_.panel_size());
    for (int64_t list = 0; list < lists_.count; list++)
      for (int64_t phase = 0; phase < windows_.rows.phases(); phase++) {
        const int64_t first_pixel = phase * view.columns + list % lists_.phases;
        T* to = out + (part_.first + list / lists_.phases) * view.channel_stride + first_pixel * view.pixel_stride;
        const int64_t end = lists_.at(sample, windows_.row_start[phase + 1], list);
        for (int64_t i = lists_.at(sample, windows_.row_start[phase], list); i < end; i++) {
          const A* sum = value_sums_ + i * kEntrySums;
          from_acc((sum[0] + sum[1]) + (sum[2] + sum[3]),
                   to[pixel_[(lists_.offset[i] - base) >> lane_bits] * view.pixel_stride]);
        }
      }
  }

  const Conv2d& conv_;
  const Windows& windows_;
  const ChannelPart part_;
  const A* packed_;
  const int64_t panel_stride_; // from a panel of all samples to the next
  A* const sums_; // of grad_weight
  const ChannelLists<A> lists_;
  A *panels_, *value_sums_ = nullptr; // kEntrySums for each entry of the lists
  int32_t* pixel_ = nullptr;
  int64_t samples_ = 0;
};

// Of grad_weight's sums and of grad_x, laid out as x, what is not null: over the non-zeros of grad_y (the sums alone) or of x.
// packed: the weight as the forward reads it.
void gradients(const Conv2d& conv, bool by_grad, Images grad_y, Images x, const void* packed, void* weight_sums,
               void* grad_x, ChannelPart part) {
  if (part.channels == 0) return;
  const Windows windows = make_windows(conv, by_grad, x, grad_y);
  const Images source = by_grad ? grad_y : x, other = by_grad ? x : grad_y;
  dispatch(conv.dtype, [&]<class T>() {
    using A = acc_t<T>;
    GradientPasses<T> passes(conv, windows, static_cast<const A*>(packed), static_cast<A*>(weight_sums), grad_x != nullptr,
                             part);
    const int64_t end = part.first_sample + part.samples;
    for (int64_t b = part.first_sample; b < end; b += passes.at_once) {
      passes.take(static_cast<const T*>(source.data) + b * windows.source.size(),
                  static_cast<const T*>(other.data) + b * windows.other.size(), min(passes.at_once, end - b));
      passes.add();
      if (grad_x != nullptr) passes.write_values(static_cast<T*>(grad_x) + b * windows.source.size());
    }
  });
}

// Some channels of grad_weight: the sums over `stretches` stretches of samples, each as long as packed_bytes, added up in
// their order.
void write_grad_weight(const Conv2d& conv, bool by_grad, void* weight_sums, int64_t stretches, Images grad_weight,
                       int64_t first, int64_t channels) {
  const Windows windows = make_windows(conv, by_grad, {nullptr, false}, {nullptr, false});
  const Places places(windows.groups, windows.group_count, windows.source.channels, windows.lanes);
  const int64_t panel_sums = conv.KH * conv.KW * windows.source.channels * windows.lanes;
  int64_t* list = static_cast<int64_t*>(scratch(1, size_t(max(channels, 1) * conv.KH * conv.KW) * sizeof(int64_t)));
  dispatch(conv.dtype, [&]<class T>() {
    using A = acc_t<T>;
    A* sums = static_cast<A*>(weight_sums);
    for (int64_t s = 1; s < stretches; s++)
      for_slices(conv, windows, first, channels, [&](int64_t at, int64_t n) {
        const A* others = sums + s * windows.panels() * panel_sums;
        for (int64_t i = at; i < at + n; i += kLanes) store(sums + i, load(sums + i) + load(others + i));
      });
    for (int64_t panel = 0; panel < windows.panels(); panel++)
      unpack_panel(conv, windows, places, sums + panel * panel_sums, panel, first, channels, list,
                   static_cast<T*>(grad_weight.data), grad_weight.channels_last);
  });
}

} // namespace
} // namespace sparsekern
