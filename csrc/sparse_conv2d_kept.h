// Packed weights kept between calls on small batches, where packing would take as long as the convolution itself.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "sparse_conv2d.h"

namespace sparsekern {

// A weight (a copy of its bytes) and what it packs to.
struct KeptWeight {
  Isa isa;
  Conv2d conv;
  bool transposed, channels_last;
  size_t weight_bytes, packed_bytes;
  std::unique_ptr<char, void (*)(void*)> weight, packed;
  size_t bytes() const { return weight_bytes + packed_bytes; }
};

inline std::unique_ptr<char, void (*)(void*)> aligned_bytes(size_t n) {
  void* p = std::aligned_alloc(64, (n + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return {static_cast<char*>(p), std::free};
}

// The last few weights. A weight is recognised by all its bytes, never by its address or version, so that nothing done to
// it, `.data` included, goes unseen; reading both copies costs a third of packing.
class KeptWeights {
 public:
  static constexpr size_t kMost = 16;
  static constexpr size_t kMostBytes = size_t(8) << 20; // of one weight: larger ones leave no cache for the copy

  // The packed weight, kept or from pack(const void* weight, void* packed) now; valid while the pointer is held.
  template <class F>
  std::shared_ptr<const KeptWeight> get(const Conv2d& conv, bool transposed, const void* weight, size_t weight_bytes,
                                        bool channels_last, size_t packed_bytes, const F& pack) {
    for (size_t i = 0; i < kMost; i++) {
      auto kept = at(i);
      if (!kept) break;
      if (same(*kept, conv, transposed, weight, weight_bytes, channels_last)) return kept;
    }
    auto made = std::make_shared<KeptWeight>(KeptWeight{isa(), conv, transposed, channels_last, weight_bytes, packed_bytes,
                                                        aligned_bytes(weight_bytes), aligned_bytes(packed_bytes)});
    std::memcpy(made->weight.get(), weight, weight_bytes);
    pack(made->weight.get(), made->packed.get()); // of the copy: another thread may be writing to the weight
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
    bytes_ += made->bytes();
    kept_.push_back(std::move(made));
    for (; kept_.size() > kMost || bytes_ > kMostInAll; kept_.pop_front()) bytes_ -= kept_.front()->bytes();
  }

  static bool same(const KeptWeight& kept, Conv2d conv, bool transposed, const void* weight, size_t weight_bytes,
                   bool channels_last) {
    conv.B = kept.conv.B; // the only size that packing does not depend on
    return kept.isa == isa() && kept.conv == conv && kept.transposed == transposed &&
           kept.channels_last == channels_last && kept.weight_bytes == weight_bytes &&
           std::memcmp(kept.weight.get(), weight, weight_bytes) == 0;
  }

  std::mutex mutex_;
  std::deque<std::shared_ptr<const KeptWeight>> kept_; // oldest first
  size_t bytes_ = 0;
};

} // namespace sparsekern
