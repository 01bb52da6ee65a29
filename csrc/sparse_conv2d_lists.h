// The non-zeros of one sample, pixel by pixel: what the sparse convolution kernels walk over.
#pragma once
#include "entries.h"
#include "sparse_conv2d.h"
#include "transpose.h"

namespace sparsekern {
namespace {

// Pixel (row, column) of a block of channels holds entries start[i] .. start[i + 1] of i = (block * rows + row) * step *
// length + column % step * length + column / step, so that what meets the same taps is next to each other. Columns are
// counted from `pad` empty ones before the image, and empty ones follow, so that no kernel checks a border.
template <class A> struct Lists {
  Entry<A>* entries; // places count weights of one tap, from the first channel of the block
  int32_t* start; // (blocks, rows, step, length)
};

// An image's sizes and how to reach pixel p, channel c of it: p * pixel_stride + c * channel_stride.
struct View {
  int64_t channels, rows, columns, pixel_stride, channel_stride;
  View(int64_t channels, int64_t rows, int64_t columns, bool channels_last)
      : channels(channels), rows(rows), columns(columns), pixel_stride(channels_last ? channels : 1),
        channel_stride(channels_last ? 1 : rows * columns) {}
  int64_t pixels() const { return rows * columns; }
  int64_t size() const { return channels * rows * columns; }
};

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// One sample as (pixel, channel), each pixel's channels contiguous, in `to` or, where x is stored so, in place.
template <class T> const T* channels_last(const T* x, const View& view, T* to) {
  if (view.channel_stride == 1 || view.channels == 1) return x;
  const int64_t pixels = view.pixels();
  for (int64_t p = 0; p < pixels; p += kLanes)
    for (int64_t c = 0; c < view.channels; c += kLanes)
      transpose(x + c * pixels + p, pixels, min(kLanes, view.channels - c), min(kLanes, pixels - p),
                to + p * view.channels + c, view.channels);
  return to;
}

} // namespace
} // namespace sparsekern
