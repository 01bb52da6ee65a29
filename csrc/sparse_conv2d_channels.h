// The non-zeros of one sample, channel by channel, and where the taps of each lie in the other image: what the gradients
// walk over.
#pragma once
#include "sparse_conv2d_rows.h"

namespace sparsekern {
namespace {

// Rows or columns. The source has the non-zeros; the other image is the dense one: the result's gradient if the source is
// x, else x. Source positions of one phase meet the same taps: position n of them meets tap k at
// place(phase, n) + shift(k).
struct Axis {
  bool by_grad; // whether the source is grad_y
  int64_t stride, padding, length, other;

  int64_t phases() const { return by_grad ? 1 : stride; }
  int64_t pace() const { return by_grad ? stride : 1; } // from one position of a phase to the next
  int64_t first(int64_t phase) const { return by_grad ? 0 : ((phase - padding) % stride + stride) % stride; }
  int64_t count(int64_t phase) const {
    return first(phase) >= length ? 0 : (length - 1 - first(phase)) / phases() + 1;
  }
  int64_t place(int64_t phase, int64_t n) const { return by_grad ? n * stride : (first(phase) + padding) / stride + n; }
  int64_t phase_of(int64_t tap) const { return by_grad ? 0 : tap % stride; }
  int64_t shift(int64_t tap) const { return by_grad ? tap - padding : -(tap / stride); }

  // How many positions of tap k's phase meet it before place `end`.
  int64_t before(int64_t tap, int64_t end) const {
    const int64_t phase = phase_of(tap), n = (end - shift(tap) - place(phase, 0) + pace() - 1) / pace();
    return min(max(n, 0), count(phase));
  }
};

// A panel of the other image (`lanes` of its channels) has `left` empty columns before it and some after, so that no
// window of taps needs a check of them; by grad_y, empty rows too, so that all kernel rows meet the same non-zeros. Groups
// as those of a Plan, of which tap t lies at `column` - t.
struct Windows {
  Axis rows, columns;
  View source, other;
  int64_t KH, KW, lanes, left, width, top, height;
  int group_count;
  Group groups[kMaxKernelWidth];
  int64_t row_start[kMaxKernelWidth + 1]; // in the order of the lists: phase by phase

  int most_taps() const {
    int most = 1;
    for (int g = 0; g < group_count; g++) most = groups[g].taps > most ? groups[g].taps : most;
    return most;
  }
  int64_t panels() const { return (other.channels + lanes - 1) / lanes; }
  int64_t panel_size() const { return height * width * lanes; }
};

Windows make_windows(const Conv2d& conv, bool by_grad, Images x, Images grad_y) {
  const View of_x(conv.C, conv.H, conv.W, x.channels_last), of_grad(conv.O, conv.OH, conv.OW, grad_y.channels_last);
  const Axis rows{by_grad, conv.SH, conv.PH, by_grad ? conv.OH : conv.H, by_grad ? conv.H : conv.OH};
  const Axis columns{by_grad, conv.SW, conv.PW, by_grad ? conv.OW : conv.W, by_grad ? conv.W : conv.OW};
  Windows windows{rows, columns, by_grad ? of_grad : of_x, by_grad ? of_x : of_grad, conv.KH, conv.KW, 0, 0, 0, 0, 0, 0,
                  {},   {}};
  const Plan plan = make_plan(conv, by_grad);
  windows.lanes = plan.lanes;
  if (by_grad) { // all taps are of one phase
    const int64_t chunks = (conv.KW + kMaxTaps - 1) / kMaxTaps;
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t first = conv.KW * i / chunks, end = conv.KW * (i + 1) / chunks;
      windows.groups[windows.group_count++] = {int(end - first), end - 1, -1, 0, 0};
    }
  } else {
    for (int g = 0; g < plan.group_count; g++) windows.groups[windows.group_count++] = plan.groups[g];
  }
  int64_t low = 0, high = columns.other - 1;
  for (int g = 0; g < windows.group_count; g++) {
    Group& group = windows.groups[g];
    group.column = columns.shift(group.kw);
    group.phase = columns.phase_of(group.kw);
    const int64_t n = columns.count(group.phase);
    if (n == 0) continue;
    low = min(low, columns.place(group.phase, 0) + group.column - group.taps + 1);
    high = max(high, columns.place(group.phase, n - 1) + group.column);
  }
  windows.left = -low;
  windows.width = high - low + 1;
  const int64_t most = by_grad && rows.length > 0 ? rows.place(0, rows.length - 1) + rows.shift(conv.KH - 1) : 0;
  windows.top = by_grad ? conv.PH : 0;
  windows.height = windows.top + max(rows.other, most + 1);
  for (int64_t phase = 0; phase < rows.phases(); phase++)
    windows.row_start[phase + 1] = windows.row_start[phase] + rows.count(phase);
  return windows;
}

// Of some channels and a few samples, one after the other; list channel * phases + phase of columns has entries
// start[sample][row][list] .. start[sample][row + 1][list] of each row, in the order of Windows::row_start.
template <class A> struct ChannelLists {
  A* value;
  int32_t* offset; // of the pixel's place in the samples' panels of the other image
  int32_t* start;
  int32_t* next; // the entry after the last of each list

  ChannelLists(const Windows& windows, int64_t channels, int64_t samples)
      : phases(windows.columns.phases()), count(channels * phases), rows(windows.source.rows + 1) {
    const int64_t entries = channels * samples * windows.source.pixels();
    value = static_cast<A*>(scratch(1, size_t(entries) * sizeof(A)));
    offset = static_cast<int32_t*>(scratch(2, size_t(entries) * sizeof(int32_t)));
    start = static_cast<int32_t*>(scratch(3, size_t(samples * rows * count) * sizeof(int32_t)));
    next = static_cast<int32_t*>(scratch(5, size_t(count) * sizeof(int32_t)));
  }
  // The first entry of a list in a sample's row, or, with as many rows as there are, the one after its last.
  int32_t at(int64_t sample, int64_t row, int64_t list) const { return start[(sample * rows + row) * count + list]; }

  int64_t phases, count, rows;
};

// Calls f(i, value) for each of the first n elements of p that is not zero; what is read next is fetched, since where the
// bits of a word end is not predicted, and nothing behind it is read ahead.
template <class T, class F> SPARSEKERN_INLINE void each_nonzero(const T* p, int64_t n, const F& f) {
  constexpr int64_t kMost = 64, kAhead = 512;
  for (int64_t first = 0; first < n; first += kMost) {
    acc_t<T> values[kMost];
    uint64_t bits = 0;
    for (int64_t i = 0; i < kMost && first + i < n; i += kLanes) {
      __builtin_prefetch(p + first + i + kAhead);
      store(values + i, load_first(p + first + i, n - first - i));
      bits |= uint64_t(nonzero_bits(values + i)) << i;
    }
    for (; bits != 0; bits &= bits - 1) {
      const int64_t i = __builtin_ctzll(bits);
      f(first + i, values[i]);
    }
  }
}

// Empty lists, each with room for all positions of its phase in so many samples.
template <class A> void clear_lists(const Windows& windows, int64_t samples, const ChannelLists<A>& lists) {
  int64_t room = 0;
  for (int64_t list = 0; list < lists.count; list++) {
    lists.next[list] = int32_t(room);
    room += samples * windows.source.rows * windows.columns.count(list % lists.phases);
  }
}

// Appends sample x, of which channels from `first` on count.
template <class T>
void list_channels(const T* x, const Windows& windows, int64_t first, int64_t sample, const ChannelLists<acc_t<T>>& lists) {
  using A = acc_t<T>;
  const View& view = windows.source;
  const Axis &rows = windows.rows, &columns = windows.columns;
  const int64_t phases = lists.phases, count = lists.count, channels = count / phases, pace = columns.pace();
  int64_t pixel_stride = view.pixel_stride;
  if (view.channel_stride == 1) {
    x += first;
  } else {
    x = channels_last(x + first * view.channel_stride, View(channels, view.rows, view.columns, false),
                      static_cast<T*>(scratch(9, size_t(channels * view.pixels()) * sizeof(T))));
    pixel_stride = channels;
  }
  const int32_t base = int32_t(sample * windows.panel_size());
  const auto add = [&](int64_t list, int64_t place, A value) {
    const int32_t at = lists.next[list]++;
    lists.value[at] = value;
    lists.offset[at] = base + int32_t(place * windows.lanes);
  };
  int32_t* start = lists.start + sample * lists.rows * count;
  for (int64_t row_phase = 0; row_phase < rows.phases(); row_phase++)
    for (int64_t n = 0; n < rows.count(row_phase); n++, start += count) {
      std::memcpy(start, lists.next, size_t(count) * sizeof(int32_t));
      const T* row = x + (rows.first(row_phase) + n * rows.phases()) * view.columns * pixel_stride;
      const int64_t row_place = (windows.top + rows.place(row_phase, n)) * windows.width + windows.left;
      for (int64_t phase = 0; phase < min(phases, windows.KW); phase++) { // the others meet no tap
        const int64_t first_column = columns.first(phase), first_place = row_place + columns.place(phase, 0);
        const int64_t length = columns.count(phase);
        for (int64_t i = 0; i < length; i++)
          each_nonzero(row + (first_column + i * phases) * pixel_stride, channels,
                       [&](int64_t c, A value) { add(c * phases + phase, first_place + i * pace, value); });
      }
    }
  std::memcpy(start, lists.next, size_t(count) * sizeof(int32_t));
}

// All panels of one sample of the other image, `stride` apart, with their empty rows and columns.
template <class T> void lay_out(const T* image, const Windows& windows, acc_t<T>* panels, int64_t stride) {
  using A = acc_t<T>;
  const View& view = windows.other;
  const int64_t lanes = windows.lanes, columns = view.columns, row_size = windows.width * lanes;
  const int64_t end = windows.left + columns, bottom = windows.top + view.rows;
  const auto clear = [&](A* from, int64_t columns) { std::memset(from, 0, size_t(columns * lanes) * sizeof(A)); };
  for (int64_t panel = 0; panel < windows.panels(); panel++) {
    A* to = panels + panel * stride;
    clear(to, windows.top * windows.width);
    clear(to + bottom * row_size, (windows.height - bottom) * windows.width);
    for (int64_t row = windows.top; row < bottom; row++) {
      clear(to + row * row_size, windows.left);
      clear(to + row * row_size + end * lanes, windows.width - end);
    }
  }
  for (int64_t row = 0; row < view.rows; row++, image += columns * view.pixel_stride) {
    A* to = panels + (windows.top + row) * row_size + windows.left * lanes;
    for (int64_t c = 0; c < view.channels; c += kLanes) {
      const int64_t channels = min(kLanes, view.channels - c);
      const T* p = image + c * view.channel_stride;
      A* at = to + c / lanes * stride + c % lanes;
      if (view.channel_stride == 1) {
        for (int64_t i = 0; i < columns; i++) store(at + i * lanes, load_first(p + i * view.pixel_stride, channels));
        continue;
      }
      for (int64_t i = 0; i < columns; i += kLanes) {
        vec<A> v[kLanes] = {};
        for (int64_t l = 0; l < channels; l++) v[l] = load_first(p + l * view.channel_stride + i, columns - i);
        transpose(v);
        for (int64_t j = 0; j < min(kLanes, columns - i); j++) store(at + (i + j) * lanes, v[j]);
      }
    }
  }
}

} // namespace
} // namespace sparsekern
