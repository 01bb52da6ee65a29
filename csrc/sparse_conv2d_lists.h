// The non-zeros of one sample, pixel by pixel: what the sparse convolution kernels walk over.
#pragma once
#include <cstdint>

#include "sparse_conv2d.h"
#include "transpose.h"
#include "vec.h"

namespace sparsekern {
namespace {

// Of a block of channels, pixel (row, column) holds entries start[row * pitch + column] .. start[row * pitch + column + 1].
// Columns are counted from `pad` empty ones before the image, and empty ones fill up the pitch, so that no kernel checks
// a border. Channels are counted from the block's first.
template <class A> struct Lists {
  A* value;
  uint16_t* channel;
  int32_t* start; // (blocks, rows, pitch)
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

#if defined(__AVX512F__)
// A mask as a number, in a register: where it widens one, GCC 12 may write the mask's two bytes to the stack and read eight.
SPARSEKERN_INLINE uint32_t bits_of(__mmask16 mask) {
  uint32_t bits = mask;
  asm("" : "+r"(bits));
  return bits;
}
#endif

// A bit for each of sixteen values that is not zero (NaN is not).
SPARSEKERN_INLINE uint32_t nonzero_bits(const float* p) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  bits = bits_of(_mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_setzero_ps(), _CMP_NEQ_UQ));
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8)
    bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p + i), _mm256_setzero_ps(), _CMP_NEQ_UQ))) << i;
#else
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(p[i] != 0) << i;
#endif
  return bits;
}
SPARSEKERN_INLINE uint32_t nonzero_bits(const double* p) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kLanes; i += 8)
    bits |= bits_of(_mm512_cmp_pd_mask(_mm512_loadu_pd(p + i), _mm512_setzero_pd(), _CMP_NEQ_UQ)) << i;
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 4)
    bits |= uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(p + i), _mm256_setzero_pd(), _CMP_NEQ_UQ))) << i;
#else
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(p[i] != 0) << i;
#endif
  return bits;
}

// Appends the non-zeros of the first n (1..16) of p, whose channels count from c, to entry `at`; returns the entry after
// the last. Up to 16 entries from `at` on are overwritten.
template <class T>
SPARSEKERN_INLINE int32_t append(const T* p, int64_t n, int32_t c, const Lists<acc_t<T>>& lists, int32_t at) {
  using A = acc_t<T>;
  const vec<A> v = load_first(p, n);
#if defined(__AVX512F__)
  // Compressed in a register and stored whole: a compressing store is microcoded on some processors.
  if constexpr (sizeof(A) == 4) {
    const __mmask16 mask = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i channels = _mm512_mask_compress_epi32(fresh(), mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(c)));
    _mm512_storeu_ps(lists.value + at, _mm512_mask_compress_ps((__m512)fresh(), mask, (__m512)v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lists.channel + at), _mm512_cvtepi32_epi16(channels));
    return at + __builtin_popcount(mask);
  }
#endif
  A values[kLanes];
  store(values, v);
  for (uint32_t bits = nonzero_bits(values); bits != 0; bits &= bits - 1, at++) {
    const int i = __builtin_ctz(bits);
    lists.value[at] = values[i];
    lists.channel[at] = uint16_t(c + i);
  }
  return at;
}

// x: one sample, channels last. The lists have room for 16 entries more than x has elements.
template <class T>
void compress(const T* x, const View& view, int64_t block, int64_t pad, int64_t pitch, const Lists<acc_t<T>>& lists) {
  int32_t n = 0, *start = lists.start;
  for (int64_t first = 0; first < view.channels; first += block) {
    const int64_t channels = min(block, view.channels - first);
    const T* p = x + first;
    for (int64_t row = 0; row < view.rows; row++, start += pitch) {
      for (int64_t i = 0; i <= pad; i++) start[i] = n;
      for (int64_t column = 0; column < view.columns; column++, p += view.channels) {
        for (int64_t c = 0; c < channels; c += kLanes)
          n = append(p + c, min(kLanes, channels - c), int32_t(c), lists, n);
        start[pad + column + 1] = n;
      }
      for (int64_t i = pad + view.columns + 1; i < pitch; i++) start[i] = n;
    }
  }
}

} // namespace
} // namespace sparsekern
