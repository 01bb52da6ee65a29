// Instruction sets: every kernel file is compiled once for each, and the one to run is chosen at run time.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsekern {

enum class Isa { baseline, avx2, avx512 };
enum class DType { f32, f64, bf16, f16 };

// The instruction set in use: what PyTorch uses (its ATEN_CPU_CAPABILITY included), never more than the processor has.
Isa isa();
// Sets it from torch.backends.cpu.get_cpu_capability(); returns the one in use afterwards.
Isa set_isa(const char* capability);
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// What decides how fast PyTorch's dense products are, whatever instruction set is in use.
struct Processor {
  bool wide;  // it multiplies 512 bits at a time, twice in a cycle: what has AVX-512, but for AMD's Zen 4 (Intel's with one
              // such unit are not told apart)
  bool dots;  // bfloat16 dot products (AVX512-BF16)
  bool tiles; // tiles of bfloat16 (AMX)
};
const Processor& processor();

// A 64-byte aligned buffer of at least `bytes` that belongs to the calling thread and to `slot`; kept between calls, its
// contents undefined. Kernels must not use std containers: an inline function of the standard library, compiled for
// AVX-512, could be the copy that the linker keeps for all.
constexpr int kScratchSlots = 10;
void* scratch(int slot, size_t bytes);

// Each op's kernel file defines one table of functions per instruction set, named OP_ISA, e.g. k_winners_avx512.
#define SPARSEKERN_CONCAT_(a, b) a##_##b
#define SPARSEKERN_CONCAT(a, b) SPARSEKERN_CONCAT_(a, b)
#define SPARSEKERN_TABLE(op) SPARSEKERN_CONCAT(op, SPARSEKERN_ISA)

template <class Table>
const Table& select(const Table& baseline, const Table& avx2, const Table& avx512) {
  switch (isa()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return baseline;
  }
}
#if defined(__x86_64__)
#define SPARSEKERN_SELECT(op) ::sparsekern::select(op##_baseline, op##_avx2, op##_avx512)
#else
#define SPARSEKERN_SELECT(op) (op##_baseline)
#endif

} // namespace sparsekern
