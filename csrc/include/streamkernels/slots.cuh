// Where a stream index lives in a segment of the cache. The Python twin is in streamkernels/core/cache.py.
#pragma once

#include <cstdint>

#include "streamkernels/platform.h"

namespace sk {

constexpr int kNoSlot = -1;

// Slot of stream index `index` in a segment of `capacity` rows, or kNoSlot when it has none.
// Unbounded: the index itself. Bounded: the first `sinks` rows stay, the rest is a ring.
// Safe for any index: garbage never maps outside [0, capacity).
SK_HOST_DEVICE int slot_of(int64_t index, int capacity, int sinks, bool bounded) {
  if (index < 0) return kNoSlot;
  if (index < capacity) return static_cast<int>(index);
  if (!bounded || sinks < 0 || capacity <= sinks) return kNoSlot;
  // a length and a row number are both below 2^31, so their sum fits 32 bits: no 64-bit division
  if (index > INT64_C(0xffffffff)) return kNoSlot;
  const uint32_t ring = static_cast<uint32_t>(capacity) - static_cast<uint32_t>(sinks);
  return sinks + static_cast<int>((static_cast<uint32_t>(index) - static_cast<uint32_t>(sinks)) % ring);
}

}  // namespace sk
