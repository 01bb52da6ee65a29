// Transposition of 16 x 16 tiles.
#pragma once
#include "vec.h"

namespace sparsekern {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
// 8 x 8 of rows 16 apart.
SPARSEKERN_INLINE void transpose8(const float* from, float* to) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256 low = _mm256_loadu_ps(from + i * kLanes), high = _mm256_loadu_ps(from + (i + 1) * kLanes);
    a[i] = _mm256_unpacklo_ps(low, high);
    a[i + 1] = _mm256_unpackhi_ps(low, high);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int j = 0; j < 4; j++) {
    _mm256_storeu_ps(to + j * kLanes, _mm256_permute2f128_ps(b[j], b[j + 4], 0x20));
    _mm256_storeu_ps(to + (j + 4) * kLanes, _mm256_permute2f128_ps(b[j], b[j + 4], 0x31));
  }
}
#endif

SPARSEKERN_INLINE void transpose(vec<float> (&v)[kLanes]) {
#if defined(__AVX512F__)
  __m512 a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i += 2) { // neighbouring rows interleaved in each 128-bit lane,
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) // then 4 x 4 blocks transposed in the lanes,
    for (int j = 0; j < 2; j++) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < kLanes; i += 8) // and the lanes themselves in two steps.
    for (int j = 0; j < 4; j++) {
      a[i + j] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0x88);
      a[i + j + 4] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    v[j] = (vec<float>)_mm512_shuffle_f32x4(a[j], a[j + 8], 0x88);
    v[j + 8] = (vec<float>)_mm512_shuffle_f32x4(a[j], a[j + 8], 0xdd);
  }
#elif defined(__AVX2__)
  float from[kLanes][kLanes], to[kLanes][kLanes];
  std::memcpy(from, v, sizeof from);
  for (int i = 0; i < kLanes; i += 8)
    for (int j = 0; j < kLanes; j += 8) transpose8(&from[i][j], &to[j][i]);
  std::memcpy(v, to, sizeof to);
#else
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < kLanes; j++) t[j][i] = v[i][j];
  std::memcpy(v, t, sizeof t);
#endif
}

SPARSEKERN_INLINE void transpose(vec<double> (&v)[kLanes]) {
  double t[kLanes][kLanes];
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < kLanes; j++) t[j][i] = v[i][j];
  std::memcpy(v, t, sizeof t);
}

// Sixteen elements of at most four bytes, each in a lane: moved, not converted.
template <class T> SPARSEKERN_INLINE vec<float> load_bits_as_float(const T* p) {
  if constexpr (sizeof(T) == 2) {
    vec<uint16_t> bits;
    std::memcpy(&bits, p, sizeof bits);
    return (vec<float>)__builtin_convertvector(bits, vec<int32_t>);
  } else {
    vec<float> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}
template <class T> SPARSEKERN_INLINE void store_bits_of_float(T* p, vec<float> v) {
  if constexpr (sizeof(T) == 2) {
    const vec<uint16_t> bits = __builtin_convertvector((vec<int32_t>)v, vec<uint16_t>);
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// to (columns, rows) = from (rows, columns), at most 16 of each.
template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  if (sizeof(T) <= 4 && rows == kLanes && columns == kLanes) {
    vec<float> v[kLanes];
    for (int64_t i = 0; i < kLanes; i++) v[i] = load_bits_as_float(from + i * from_stride);
    transpose(v);
    for (int64_t i = 0; i < kLanes; i++) store_bits_of_float(to + i * to_stride, v[i]);
    return;
  }
  for (int64_t j = 0; j < columns; j++)
    for (int64_t i = 0; i < rows; i++) to[j * to_stride + i] = from[i * from_stride + j];
}

// to (columns, kStride; zeros up to whole vectors of rows) = the transpose of from (rows, columns; stride).
template <int64_t kStride, class T>
void to_samples(const T* from, int64_t stride, int64_t rows, int64_t columns, acc_t<T>* to) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t s = 0; s < rows; s += kLanes) {
      vec<A> v[kLanes];
      for (int64_t k = 0; k < kLanes; k++)
        v[k] = s + k < rows ? load_first(from + (s + k) * stride + c, columns - c) : vec<A>{};
      transpose(v);
      for (int64_t k = 0; k < kLanes && c + k < columns; k++) store(to + (c + k) * kStride + s, v[k]);
    }
}

// The way back, from (columns up to whole vectors, kStride). Zero where x, which lies as `to` does, is zero, unless it is null.
template <int64_t kStride, class T>
void from_samples(const acc_t<T>* from, int64_t rows, int64_t columns, T* to, int64_t stride, const T* x = nullptr) {
  using A = acc_t<T>;
  const vec<A> zeros{};
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      vec<A> v[kLanes];
      for (int64_t k = 0; k < kLanes; k++) v[k] = load(from + (c + k) * kStride + r);
      transpose(v);
      for (int64_t k = 0; k < kLanes && r + k < rows; k++) {
        const int64_t at = (r + k) * stride + c, count = columns - c;
        store_first(to + at, x != nullptr ? (load_first(x + at, count) != 0 ? v[k] : zeros) : v[k], count);
      }
    }
}

} // namespace
} // namespace sparsekern
