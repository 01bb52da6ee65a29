// The two ends of a pass: the weight as the row kernels read it, and their sums as the result keeps them.
#pragma once
#include "sparse_conv2d_rows.h"

namespace sparsekern {
namespace {

// Where the slices of one panel (kh, group, source channel, tap, lanes) hold (source channel, kh, kw).
struct Places {
  int64_t per_row, base[kMaxKernelWidth], per_channel[kMaxKernelWidth];
  Places(const Group* groups, int group_count, int64_t channels, int64_t lanes) : per_row(0) {
    for (int g = 0; g < group_count; g++) {
      const Group& group = groups[g];
      for (int64_t t = 0; t < group.taps; t++) {
        base[group.kw + t * group.kw_step] = per_row + t * lanes;
        per_channel[group.kw + t * group.kw_step] = group.taps * lanes;
      }
      per_row += group.taps * channels * lanes;
    }
  }
  int64_t at(int64_t channel, int64_t kh, int64_t kw) const {
    return kh * per_row + base[kw] + channel * per_channel[kw];
  }
};

// The places of one filter's elements in the order in which they lie in memory; where KH KW C are not all walked over, the
// rest is of size one.
void list_places(const Places& places, int64_t first, int64_t C, int64_t KH, int64_t KW, bool channels_last,
                 int64_t* list) {
  const int64_t c_step = channels_last ? 1 : KH * KW, tap_step = channels_last ? C : 1;
  for (int64_t c = 0; c < C; c++)
    for (int64_t kh = 0; kh < KH; kh++)
      for (int64_t kw = 0; kw < KW; kw++)
        list[c * c_step + (kh * KW + kw) * tap_step] = places.at(first + c, kh, kw);
}

// Up to 16 rows `stride` apart, n elements each, turned: element j of all rows to to[list[j]].
template <class T>
void pack_rows(const T* weight, int64_t stride, int64_t rows, int64_t n, const int64_t* list, acc_t<T>* to) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = min(kLanes, n - j);
    vec<acc_t<T>> v[kLanes] = {};
    if (rows == kLanes && count == kLanes) {
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; l++) v[l] = load(weight + l * stride + j);
    } else {
      for (int64_t l = 0; l < rows; l++) v[l] = load_first(weight + l * stride + j, count);
    }
    transpose(v);
    for (int64_t i = 0; i < count; i++) store(to + list[j + i], v[i]);
  }
}

// weight (O, C, KH, KW), or (O, KH, KW, C) in memory if channels_last; 16 channels of the result, from `first`, of packed
// (panel, kh, group, source channel, tap, lanes). list: room for a filter's elements.
template <class T>
void pack_panel(const Conv2d& conv, const Plan& plan, const Places& places, const T* weight, bool channels_last,
                int64_t first, int64_t* list, acc_t<T>* packed) {
  const int64_t n = min(kLanes, plan.result.channels - first), taps = conv.KH * conv.KW;
  acc_t<T>* to = packed + first / plan.lanes * plan.panel_size() + first % plan.lanes;
  if (!plan.transposed) {
    list_places(places, 0, conv.C, conv.KH, conv.KW, channels_last, list);
    return pack_rows(weight + first * conv.C * taps, conv.C * taps, n, conv.C * taps, list, to);
  }
  for (int64_t o = 0; o < conv.O; o++) { // the result's channels are the weight's C, the source's its O
    const T* filter = weight + o * conv.C * taps + first * (channels_last ? 1 : taps);
    list_places(places, o, 1, conv.KH, conv.KW, false, list);
    if (channels_last)
      for (int64_t t = 0; t < taps; t++) store(to + list[t], load_first(filter + t * conv.C, n));
    else
      pack_rows(filter, taps, n, taps, list, to);
  }
}

// x where mask is not zero, else zero.
template <class T> void keep(const T* mask, T* x, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if constexpr (sizeof(T) == 2) x[i].bits = (mask[i].bits & 0x7fff) != 0 ? x[i].bits : 0; // both have 15 bits beside the sign
    else x[i] = mask[i] != 0 ? x[i] : T{};
}

// Writes 16 channels of every pixel of one sample from sums (rows, phases, width, lanes). place: where column w of a row
// lies in it. mask: null, or laid out as out.
template <class T>
void finish(const Plan& plan, const int32_t* place, const acc_t<T>* sums, vec<acc_t<T>> bias, const T* mask, T* out,
            int64_t first) {
  using A = acc_t<T>;
  const View& view = plan.result;
  const int64_t channels = min(kLanes, view.channels - first), pixels = view.pixels();
  const int64_t row_size = plan.phase_count * plan.width * plan.lanes;
  out += first * view.channel_stride;
  if (mask != nullptr) mask += first * view.channel_stride;
  int64_t column = 0;
  const auto next = [&] {
    const vec<A> v = load(sums + place[column]) + bias;
    if (++column == view.columns) column = 0, sums += row_size;
    return v;
  };
  if (view.channel_stride == 1) {
    for (int64_t p = 0; p < pixels; p++, out += view.channels) {
      vec<A> v = next();
      if (mask != nullptr) v = load_first(mask + p * view.channels, channels) != 0 ? v : vec<A>{};
      store_first(out, v, channels);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    const int64_t n = min(kLanes, pixels - p);
    vec<A> v[kLanes] = {};
    for (int64_t i = 0; i < n; i++) v[i] = next();
    transpose(v);
    for (int64_t l = 0; l < channels; l++) store_first(out + l * pixels + p, v[l], n);
  }
  if (mask != nullptr) keep(mask, out, channels * pixels); // in one stream, where tiles would read sixteen
}

} // namespace
} // namespace sparsekern
