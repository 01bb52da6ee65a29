#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparsekern {
namespace {

Isa current = Isa::baseline;

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

} // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt");
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx2) return avx2;
#endif
  return isa == Isa::baseline;
}

const Processor& processor() {
  static const Processor found = [] {
    Processor p{};
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid(1, &a, &b, &c, &d);
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
    p.wide = __builtin_cpu_supports("avx512f") && !(__builtin_cpu_is("amd") && family == 0x19);
    p.dots = __builtin_cpu_supports("avx512bf16");
    p.tiles = __builtin_cpu_supports("amx-tile");
#endif
    return p;
  }();
  return found;
}

Isa isa() { return current; }

Isa set_isa(const char* capability) {
  Isa wanted = Isa::baseline;
  if (std::strncmp(capability, "AVX512", 6) == 0) wanted = Isa::avx512;
  else if (std::strcmp(capability, "AVX2") == 0) wanted = Isa::avx2;
  while (!isa_supported(wanted)) wanted = static_cast<Isa>(static_cast<int>(wanted) - 1);
  return current = wanted;
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

void* scratch(int slot, size_t bytes) {
  static thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (buffer.data == nullptr) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

} // namespace sparsekern
