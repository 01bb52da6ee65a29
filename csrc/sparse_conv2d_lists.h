// The non-zeros of one sample, pixel by pixel: what the sparse convolution kernels walk over.
#pragma once
#include <cstdint>

#include "sparse_conv2d.h"
#include "vec.h"

namespace sparsekern {
namespace {

// Pixel (row, column) holds entries start[row * pitch + column] .. start[row * pitch + column + 1]. Columns are counted
// from `pad` empty ones before the image, and empty ones fill up the pitch, so that no kernel checks a border.
template <class A> struct Lists {
  A* value;
  int32_t* channel;
  int32_t* start; // (rows, pitch)
};

// An image's sizes and how to reach pixel p, channel c of it: p * pixel_stride + c * channel_stride.
struct View {
  int64_t channels, rows, columns, pixel_stride, channel_stride;
  View(int64_t channels, int64_t rows, int64_t columns, bool channels_last)
      : channels(channels), rows(rows), columns(columns), pixel_stride(channels_last ? channels : 1),
        channel_stride(channels_last ? 1 : rows * columns) {}
  int64_t size() const { return channels * rows * columns; }
};

template <class T>
void compress(const T* x, const View& view, int64_t pad, int64_t pitch, const Lists<acc_t<T>>& lists) {
  int32_t n = 0;
  for (int64_t row = 0; row < view.rows; row++) {
    int32_t* start = lists.start + row * pitch;
    for (int64_t i = 0; i <= pad; i++) start[i] = n;
    for (int64_t column = 0; column < view.columns; column++) {
      const T* pixel = x + (row * view.columns + column) * view.pixel_stride;
      for (int64_t c = 0; c < view.channels; c++) {
        const acc_t<T> value = to_acc(pixel[c * view.channel_stride]);
        lists.value[n] = value;
        lists.channel[n] = int32_t(c);
        n += value != 0;
      }
      start[pad + column + 1] = n;
    }
    for (int64_t i = pad + view.columns + 1; i < pitch; i++) start[i] = n;
  }
}

} // namespace
} // namespace sparsekern
