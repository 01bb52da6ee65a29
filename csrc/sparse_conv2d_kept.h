// Packed weights kept between calls on small batches, where packing would take as long as the convolution itself.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

#include "sparse_conv2d.h"

namespace sparsekern {

// What a weight packs to.
struct KeptWeight {
  // What kind of weight it is, and its first bytes: most of what changes shows in these.
  struct Kind {
    Isa isa;
    Conv2d conv; // of no samples: packing does not depend on them
    bool transposed, channels_last;
    size_t bytes;
    char first[64];
    bool operator==(const Kind&) const = default;
  };
  Kind kind;
  Fingerprint fingerprint;
  size_t packed_bytes;
  std::unique_ptr<char, void (*)(void*)> packed;
};

inline std::unique_ptr<char, void (*)(void*)> aligned_bytes(size_t n) {
  void* p = std::aligned_alloc(64, (n + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return {static_cast<char*>(p), std::free};
}

// The last few weights. A weight is recognised by all its bytes, never by its address or version, so that nothing done to
// it, `.data` included, goes unseen; a fingerprint of them takes a seventh of packing, and a third of comparing a copy.
class KeptWeights {
 public:
  static constexpr size_t kMost = 16;
  static constexpr size_t kMostBytes = size_t(8) << 20; // of one weight

  // The packed weight, kept or from pack(const void* weight, void* packed) now; valid while the pointer is held.
  template <class F>
  std::shared_ptr<const KeptWeight> get(const SparseConv2dKernels& kernels, Conv2d conv, bool transposed, const void* weight,
                                        size_t bytes, bool channels_last, size_t packed_bytes, const F& pack) {
    conv.B = 0;
    KeptWeight::Kind kind{isa(), conv, transposed, channels_last, bytes, {}};
    std::memcpy(kind.first, weight, std::min(bytes, sizeof(kind.first)));
    std::optional<Fingerprint> fingerprint;
    for (size_t i = 0; i < kMost; i++) {
      auto kept = at(i);
      if (!kept) break;
      if (kept->kind != kind) continue;
      if (!fingerprint) fingerprint = kernels.fingerprint(weight, bytes);
      if (kept->fingerprint == *fingerprint) return kept;
    }
    const auto copy = aligned_bytes(bytes); // another thread may be writing to the weight
    std::memcpy(copy.get(), weight, bytes);
    std::memcpy(kind.first, copy.get(), std::min(bytes, sizeof(kind.first)));
    auto made = std::make_shared<KeptWeight>(
        KeptWeight{kind, kernels.fingerprint(copy.get(), bytes), packed_bytes, aligned_bytes(packed_bytes)});
    pack(copy.get(), made->packed.get());
    keep(made);
    return made;
  }

 private:
  static constexpr size_t kMostInAll = size_t(64) << 20;

  std::shared_ptr<const KeptWeight> at(size_t i) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return i < kept_.size() ? kept_[i] : nullptr;
  }

  // Drops the oldest while they are too many or too large: what is larger than the bound by itself is not kept.
  void keep(std::shared_ptr<const KeptWeight> made) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ += made->packed_bytes;
    kept_.push_back(std::move(made));
    for (; kept_.size() > kMost || bytes_ > kMostInAll; kept_.pop_front()) bytes_ -= kept_.front()->packed_bytes;
  }

  std::mutex mutex_;
  std::deque<std::shared_ptr<const KeptWeight>> kept_; // oldest first
  size_t bytes_ = 0;
};

} // namespace sparsekern
