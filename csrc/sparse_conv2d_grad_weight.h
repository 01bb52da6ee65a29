// Weight gradient of the sparse-input convolution, from the non-zeros of the output's gradient or of the input.
#pragma once
#include "sparse_conv2d_lists.h"

namespace sparsekern {
namespace {

// One sample as (pixel, channel) in the accumulator type, in scratch slots 2 and 3 or, where it lies so, in place.
template <class T> const acc_t<T>* widened(const T* x, const View& view) {
  x = channels_last(x, view, static_cast<T*>(scratch(2, size_t(view.size()) * sizeof(T))));
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) return x;
  else {
    acc_t<T>* to = static_cast<acc_t<T>*>(scratch(3, size_t(view.size()) * sizeof(acc_t<T>)));
    for (int64_t i = 0; i < view.size(); i += kLanes)
      store_first(to + i, load_first(x + i, view.size() - i), view.size() - i);
    return to;
  }
}

// to[0..n) += value * from[0..n)
template <class A> SPARSEKERN_INLINE void add_scaled(A value, const A* from, int64_t n, A* to) {
  const vec<A> v = splat(value);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, fma(v, load(from + i), load(to + i)));
  if (i < n) store_first(to + i, fma(v, load_first(from + i, n - i), load_first(to + i, n - i)), n - i);
}

// sums (filter, kh, kw, c), of filters first..first+n.
template <class T>
void add_by_grad(const Conv2d& conv, const T* grad_y, const View& grad_view, const acc_t<T>* x, acc_t<T>* sums,
                 int64_t first, int64_t n) {
  using A = acc_t<T>;
  for (int64_t oh = 0; oh < conv.OH; oh++)
    for (int64_t ow = 0; ow < conv.OW; ow++)
      for (int64_t o = first; o < first + n; o++) {
        const A g = to_acc(grad_y[(oh * conv.OW + ow) * grad_view.pixel_stride + o * grad_view.channel_stride]);
        if (g == 0) continue;
        const int64_t h = oh * conv.SH - conv.PH, w = ow * conv.SW - conv.PW;
        const int64_t low = w < 0 ? -w : 0, high = w + conv.KW > conv.W ? conv.W - w : conv.KW; // kw inside the image
        if (low >= high) continue;
        for (int64_t kh = 0; kh < conv.KH; kh++)
          if (h + kh >= 0 && h + kh < conv.H)
            add_scaled(g, x + ((h + kh) * conv.W + w + low) * conv.C, (high - low) * conv.C,
                       sums + (((o - first) * conv.KH + kh) * conv.KW + low) * conv.C);
      }
}

// sums (c, kh, kw, filter), of channels first..first+n.
template <class T>
void add_by_input(const Conv2d& conv, const acc_t<T>* grad_y, const T* x, const View& x_view, acc_t<T>* sums,
                  int64_t first, int64_t n) {
  using A = acc_t<T>;
  for (int64_t h = 0; h < conv.H; h++)
    for (int64_t w = 0; w < conv.W; w++)
      for (int64_t c = first; c < first + n; c++) {
        const A v = to_acc(x[(h * conv.W + w) * x_view.pixel_stride + c * x_view.channel_stride]);
        if (v == 0) continue;
        for (int64_t kh = 0; kh < conv.KH; kh++)
          for (int64_t kw = 0; kw < conv.KW; kw++) {
            const int64_t oh = h + conv.PH - kh, ow = w + conv.PW - kw;
            if (oh < 0 || ow < 0 || oh % conv.SH != 0 || ow % conv.SW != 0) continue;
            if (oh / conv.SH >= conv.OH || ow / conv.SW >= conv.OW) continue;
            add_scaled(v, grad_y + (oh / conv.SH * conv.OW + ow / conv.SW) * conv.O, conv.O,
                       sums + (((c - first) * conv.KH + kh) * conv.KW + kw) * conv.O);
          }
      }
}

void grad_weight_by_grad(const Conv2d& conv, Images grad_y, Images x, void* grad_weight, int64_t first, int64_t n) {
  dispatch(conv.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const View grad_view(conv.O, conv.OH, conv.OW, grad_y.channels_last), x_view(conv.C, conv.H, conv.W, x.channels_last);
    const int64_t taps = conv.KH * conv.KW;
    A* sums = static_cast<A*>(scratch(1, size_t(n * taps * conv.C) * sizeof(A)));
    std::memset(sums, 0, size_t(n * taps * conv.C) * sizeof(A));
    for (int64_t b = 0; b < conv.B; b++)
      add_by_grad(conv, static_cast<const T*>(grad_y.data) + b * grad_view.size(), grad_view,
                  widened(static_cast<const T*>(x.data) + b * x_view.size(), x_view), sums, first, n);
    T* out = static_cast<T*>(grad_weight) + first * conv.C * taps;
    for (int64_t o = 0; o < n; o++)
      for (int64_t c = 0; c < conv.C; c++)
        for (int64_t t = 0; t < taps; t++)
          from_acc(sums[(o * taps + t) * conv.C + c], out[(o * conv.C + c) * taps + t]);
  });
}

void grad_weight_by_input(const Conv2d& conv, Images grad_y, Images x, void* grad_weight, int64_t first, int64_t n) {
  dispatch(conv.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const View grad_view(conv.O, conv.OH, conv.OW, grad_y.channels_last), x_view(conv.C, conv.H, conv.W, x.channels_last);
    const int64_t taps = conv.KH * conv.KW;
    A* sums = static_cast<A*>(scratch(1, size_t(n * taps * conv.O) * sizeof(A)));
    std::memset(sums, 0, size_t(n * taps * conv.O) * sizeof(A));
    for (int64_t b = 0; b < conv.B; b++)
      add_by_input(conv, widened(static_cast<const T*>(grad_y.data) + b * grad_view.size(), grad_view),
                   static_cast<const T*>(x.data) + b * x_view.size(), x_view, sums, first, n);
    T* out = static_cast<T*>(grad_weight);
    for (int64_t o = 0; o < conv.O; o++)
      for (int64_t c = 0; c < n; c++)
        for (int64_t t = 0; t < taps; t++)
          from_acc(sums[(c * taps + t) * conv.O + o], out[(o * conv.C + first + c) * taps + t]);
  });
}

} // namespace
} // namespace sparsekern
