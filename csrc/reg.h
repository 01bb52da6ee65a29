// Vectors of one register, where values are compared or carried through a loop: GCC takes comparisons of wider vectors
// (csrc/vec.h) apart into scalars and keeps loop-carried ones in memory.
#pragma once
#include "vec.h"

namespace sparsekern {
namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <class E> struct reg_of { typedef E type __attribute__((vector_size(kRegister))); };
template <class E> using reg = typename reg_of<E>::type;
template <class E> constexpr int kRegLanes = kRegister / sizeof(E);

// A register of neighbouring elements, of any alignment, as A.
SPARSEKERN_INLINE reg<float> load_reg(const float* p) { reg<float> v; std::memcpy(&v, p, sizeof v); return v; }
SPARSEKERN_INLINE reg<double> load_reg(const double* p) { reg<double> v; std::memcpy(&v, p, sizeof v); return v; }
SPARSEKERN_INLINE reg<float> load_reg(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(kRegister / 2)));
  half h;
  std::memcpy(&h, p, sizeof h);
  return (reg<float>)(__builtin_convertvector(h, reg<uint32_t>) << 16);
}
SPARSEKERN_INLINE reg<float> load_reg(const f16* p) {
#if defined(__AVX512F__)
  return (reg<float>)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (reg<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  reg<float> v;
  for (int i = 0; i < kRegLanes<float>; i++) v[i] = to_acc(p[i]);
  return v;
#endif
}
SPARSEKERN_INLINE void store_reg(float* p, reg<float> v) { std::memcpy(p, &v, sizeof v); }
SPARSEKERN_INLINE void store_reg(double* p, reg<double> v) { std::memcpy(p, &v, sizeof v); }

template <class E> SPARSEKERN_INLINE void keep_in_register(E& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

// a * b + c in one rounding where the instruction set has it.
SPARSEKERN_INLINE reg<float> fma_reg(reg<float> a, reg<float> b, reg<float> c) {
#if defined(__AVX512F__)
  return (reg<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (reg<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
SPARSEKERN_INLINE reg<double> fma_reg(reg<double> a, reg<double> b, reg<double> c) {
#if defined(__AVX512F__)
  return (reg<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (reg<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Pairwise: lane i + lane i + half of the lanes, and so on.
template <class A> SPARSEKERN_INLINE A sum_reg(reg<A> v) {
  A lanes[kRegLanes<A>];
  std::memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
  for (int n = kRegLanes<A> / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
  return lanes[0];
}

template <class A> SPARSEKERN_INLINE reg<A> load_reg_as(const float* p) {
  typedef float narrow __attribute__((vector_size(kRegLanes<A> * sizeof(float))));
  narrow v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, reg<A>);
}

} // namespace
} // namespace sparsekern
