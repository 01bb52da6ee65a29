// Sixteen-lane vectors for the kernel files: GCC and Clang vector types, which become zmm, ymm or xmm registers (or NEON)
// by the flags that the file is compiled with, so that one source serves every instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace sparsekern {
namespace { // each instruction set its own copy: see scratch() in isa.h

#define SPARSEKERN_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// Storage type -> the type that sums are taken in.
template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };
template <class T> using acc_t = typename accumulator<T>::type;

template <class A> struct vec_of;
template <> struct vec_of<float> { typedef float type __attribute__((vector_size(4 * kLanes))); };
template <> struct vec_of<double> { typedef double type __attribute__((vector_size(8 * kLanes))); };
template <> struct vec_of<int32_t> { typedef int32_t type __attribute__((vector_size(4 * kLanes))); };
template <> struct vec_of<int64_t> { typedef int64_t type __attribute__((vector_size(8 * kLanes))); };
template <> struct vec_of<uint16_t> { typedef uint16_t type __attribute__((vector_size(2 * kLanes))); };
template <class A> using vec = typename vec_of<A>::type;

#if defined(__AVX512F__)
// What to expand or compress into. These instructions wait for what the register that they write held, even where they
// replace all of it: one after the other into the same register, each takes five cycles (Zen 5) in place of 1.2.
SPARSEKERN_INLINE __m512i fresh() {
  __m512i zeros;
  asm volatile("vpxord %0, %0, %0" : "=v"(zeros));
  return zeros;
}
#endif

template <class A> SPARSEKERN_INLINE vec<A> splat(A a) { return a - vec<A>{}; } // x - 0 is x, so that nothing is computed

// a * b + c in one rounding where the instruction set has it.
SPARSEKERN_INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  typedef float half __attribute__((vector_size(32)));
  half x[2], y[2], z[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  z[0] = (half)_mm256_fmadd_ps((__m256)x[0], (__m256)y[0], (__m256)z[0]);
  z[1] = (half)_mm256_fmadd_ps((__m256)x[1], (__m256)y[1], (__m256)z[1]);
  std::memcpy(&c, z, 64);
  return c;
#else
  return a * b + c;
#endif
}
SPARSEKERN_INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) {
#if defined(__AVX512F__)
  __m512d x[2], y[2], z[2];
  std::memcpy(x, &a, 128), std::memcpy(y, &b, 128), std::memcpy(z, &c, 128);
  z[0] = _mm512_fmadd_pd(x[0], y[0], z[0]);
  z[1] = _mm512_fmadd_pd(x[1], y[1], z[1]);
  std::memcpy(&c, z, 128);
  return c;
#else
  return a * b + c;
#endif
}

// One element, to and from the accumulator type. Narrowing rounds to nearest even; NaN stays NaN.
SPARSEKERN_INLINE float to_acc(float v) { return v; }
SPARSEKERN_INLINE double to_acc(double v) { return v; }
SPARSEKERN_INLINE float to_acc(bf16 v) { uint32_t u = uint32_t(v.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
SPARSEKERN_INLINE float to_acc(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // Shift exponent and mantissa into place and rescale by 2^112: exact for normals, subnormals and zeros.
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
  uint32_t u = rest; float f; std::memcpy(&f, &u, 4);
  if (rest >= 0x0f800000u) { u = rest | 0x7f800000u; std::memcpy(&f, &u, 4); } // inf, NaN
  else f *= 0x1p112f;
  std::memcpy(&u, &f, 4); u |= sign; std::memcpy(&f, &u, 4);
  return f;
#endif
}
SPARSEKERN_INLINE void from_acc(float v, float& out) { out = v; }
SPARSEKERN_INLINE void from_acc(double v, double& out) { out = v; }
SPARSEKERN_INLINE void from_acc(float v, bf16& out) {
  uint32_t u; std::memcpy(&u, &v, 4);
  out.bits = v != v ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
SPARSEKERN_INLINE void from_acc(float v, f16& out) {
#if defined(__F16C__)
  out.bits = uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  uint32_t u; std::memcpy(&u, &v, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000); u &= 0x7fffffff;
  if (u > 0x7f800000u) out.bits = uint16_t(sign | 0x7e00);
  else if (u >= 0x477ff000u) out.bits = uint16_t(sign | 0x7c00); // 65520 and above round to inf
  else if (u >= 0x38800000u) out.bits = uint16_t(sign | ((u - 0x38000000u + 0xfff + ((u >> 13) & 1)) >> 13));
  else { // subnormal: adding 0.5 aligns the mantissa and rounds it in hardware
    float f; std::memcpy(&f, &u, 4); f += 0.5f; std::memcpy(&u, &f, 4); out.bits = uint16_t(sign | (u - 0x3f000000u));
  }
#endif
}

// Sixteen neighbouring elements, of any alignment.
SPARSEKERN_INLINE vec<float> load(const float* p) { vec<float> v; std::memcpy(&v, p, sizeof v); return v; }
SPARSEKERN_INLINE vec<double> load(const double* p) { vec<double> v; std::memcpy(&v, p, sizeof v); return v; }
SPARSEKERN_INLINE vec<float> load(const bf16* p) {
  vec<uint16_t> h; std::memcpy(&h, p, sizeof h);
  typedef uint32_t u32 __attribute__((vector_size(4 * kLanes)));
  const u32 u = __builtin_convertvector(h, u32) << 16;
  return (vec<float>)u;
}
SPARSEKERN_INLINE vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  vec<float> v;
  for (int i = 0; i < kLanes; i++) v[i] = to_acc(p[i]);
  return v;
#endif
}
SPARSEKERN_INLINE void store(float* p, vec<float> v) { std::memcpy(p, &v, sizeof v); }
SPARSEKERN_INLINE void store(double* p, vec<double> v) { std::memcpy(p, &v, sizeof v); }
template <class T> SPARSEKERN_INLINE void store(T* p, vec<float> v) { // bf16, f16
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, f16>) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else { // as from_acc
    const __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
  }
#else
  for (int i = 0; i < kLanes; i++) from_acc(v[i], p[i]);
#endif
}

// The first n (0..16) of sixteen; the rest read as zero and are not touched.
template <class T> SPARSEKERN_INLINE vec<acc_t<T>> load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T tmp[kLanes] = {};
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return (vec<acc_t<T>>)_mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)tmp, _mm256_maskz_loadu_epi16(mask, p));
  else
#endif
    if (n > 0) std::memcpy(tmp, p, size_t(n) * sizeof(T)); // of none, p may be null
  return load(tmp);
}
template <class T> SPARSEKERN_INLINE void store_first(T* p, vec<acc_t<T>> v, int64_t n) {
  if (n >= kLanes) { store(p, v); return; }
  T tmp[kLanes];
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4) { _mm512_mask_storeu_ps(p, mask, (__m512)v); return; }
#endif
  store(tmp, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256((const __m256i*)tmp));
  else
#endif
    if (n > 0) std::memcpy(p, tmp, size_t(n) * sizeof(T));
}

// Pairwise, the same order on every instruction set: lane i + lane i + 8, then + 4, + 2, + 1.
template <class A> SPARSEKERN_INLINE A sum(vec<A> v) {
  typedef A v8 __attribute__((vector_size(8 * sizeof(A))));
  typedef A v4 __attribute__((vector_size(4 * sizeof(A))));
  const v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// Calls f.template operator()<T>() with the storage type of dtype.
template <class F> SPARSEKERN_INLINE void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: f.template operator()<float>(); break;
    case DType::f64: f.template operator()<double>(); break;
    case DType::bf16: f.template operator()<bf16>(); break;
    case DType::f16: f.template operator()<f16>(); break;
  }
}

} // namespace
} // namespace sparsekern
