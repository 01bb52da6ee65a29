// What the kernel tests share: `PROGRAM ISA` runs the kernels of one instruction set; 77 says that the processor lacks it.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "vec.h"

namespace sparsekern {

inline int failures = 0;

// Reports the case, as printf does, unless the condition holds.
template <class... Args> void expect(bool condition, const char* format, Args... args) {
  if (condition) return;
  if (++failures <= 20) std::printf(format, args...), std::printf("\n");
}

// Chooses the instruction set of the first argument; returns false where the processor lacks it.
inline bool choose_isa(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "baseline";
  const char* capability = wanted == "avx512" ? "AVX512" : wanted == "avx2" ? "AVX2" : "DEFAULT";
  return isa_name(set_isa(capability)) == wanted;
}

inline int result() {
  std::printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

} // namespace sparsekern
