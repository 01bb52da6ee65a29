// A fingerprint of bytes, by which they are recognised again.
#pragma once
#include "sparse_conv2d.h"
#include "vec.h"

namespace sparsekern {
namespace {

// Each lane takes a number of its own from every kilobyte, by steps that map no two numbers, and no two states, to the same:
// bytes that differ in one number of a lane always differ in the lane, others by chance once in 2^64.
inline Fingerprint fingerprint(const void* data, size_t bytes) {
  typedef uint64_t numbers __attribute__((vector_size(64)));
  constexpr int kStates = 16; // their multiplications wait less for each other
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
  static_assert(sizeof(Fingerprint) == kStates * sizeof(numbers));
  numbers state[kStates] = {};
  const auto take = [&](const char* kilobyte) {
#pragma GCC unroll 16
    for (int s = 0; s < kStates; s++) {
      numbers n;
      std::memcpy(&n, kilobyte + s * sizeof(n), sizeof(n));
      n ^= state[s];
      state[s] = (n << 31 | n >> 33) * kOdd;
    }
  };
  const char* at = static_cast<const char*>(data);
  for (; bytes >= sizeof(Fingerprint); bytes -= sizeof(Fingerprint), at += sizeof(Fingerprint)) take(at);
  char rest[sizeof(Fingerprint)] = {};
  if (bytes > 0) std::memcpy(rest, at, bytes);
  take(rest);
  Fingerprint out;
  std::memcpy(&out, state, sizeof(out));
  return out;
}

} // namespace
} // namespace sparsekern
