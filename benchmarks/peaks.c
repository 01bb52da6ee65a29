// What one core can do at most: multiply-adds from registers, and reads from a buffer of any size. See roofline.py.
#include <stddef.h>
#include <time.h>

#if defined(__AVX512F__)
enum { kLanes = 16, kSums = 24 };
#else
enum { kLanes = 8, kSums = 12 };
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile float one = 1.0f, sink; // what the compiler can neither foresee nor leave out

// Floating-point operations a second: enough independent sums to hide the latency.
double flops(long rounds) {
  Vec sums[kSums], a, b;
  for (int lane = 0; lane < kLanes; lane++) a[lane] = 0.5f * one, b[lane] = one;
  for (int i = 0; i < kSums; i++) sums[i] = a;
  const double start = now();
  for (long r = 0; r < rounds; r++)
#pragma GCC unroll 24
    for (int i = 0; i < kSums; i++) sums[i] = sums[i] * a + b;
  const double seconds = now() - start;
  for (int i = 0; i < kSums; i++) sink = sums[i][0];
  return 2.0 * kLanes * kSums * (double)rounds / seconds;
}

// Bytes read a second from a buffer of n floats (a multiple of 8 * kLanes), so many times over.
double read_rate(const float* x, size_t n, long rounds) {
  Vec sums[8] = {0};
  const double start = now();
  for (long r = 0; r < rounds; r++) {
    for (size_t i = 0; i < n; i += 8 * kLanes)
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sums[j] += *(const Vec*)(x + i + (size_t)j * kLanes);
    __asm__ volatile("" ::: "memory");
  }
  const double seconds = now() - start;
  for (int j = 0; j < 8; j++) sink = sums[j][0];
  return (double)(n * sizeof(float)) * (double)rounds / seconds;
}
