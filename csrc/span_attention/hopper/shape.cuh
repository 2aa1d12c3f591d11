// How a block of the Hopper kernel is made up: two warpgroups that have 64 rows of q each, a warp that finds out what
// they see, a thread that fetches it, and what lies where in shared memory.
#pragma once

#include <cstdint>

#include "span_attention/hopper/plan.h"
#include "streamkernels/numbers.cuh"

namespace sk::span_attention::hopper {

constexpr int kGroup = 128;           // threads of a warpgroup
constexpr int kReaders = 2 * kGroup;  // who multiplies
constexpr int kThreads = kReaders + kGroup;
constexpr int kReaderWarps = kReaders / 32;

// A block of so many threads is given 168 registers for each; what readers take, the other warpgroup has handed in.
constexpr bool registers_suffice(int of_readers, int of_others) {
  return of_readers * kReaders + of_others * kGroup <= 168 * kThreads;
}

// An item: kRows rows of one query head.
struct Item {
  int head;    // b * H + h
  int block;   // of 128 rows
  int tiles;   // of keys, at least one; negative: there are no more items
  int unused;  // 16 bytes are read at once
};

// What the rows of an item see in one slot.
struct Hull {
  int begin, end;             // of what some row sees
  int last_begin, first_end;  // of rows that see anything
  bool all;                   // whether every row sees something

  __device__ __forceinline__ bool gapless() const { return last_begin <= first_end; }
};

// A tile of keys as it was fetched: 128 from `first` on. Those below `fresh` belong to the tile before.
struct Keys {
  int first, fresh;
  int end;  // of the keys that some row sees
  int16_t slot;
  int16_t kind;
};
constexpr int kMasked = 0;  // rows see some of them each
constexpr int kWhole = 1;   // every row sees all of them
constexpr int kShort = 2;   // like kMasked; nobody sees those from `end` on
constexpr int kHoles = 3;   // like kMasked; nobody may see any of them

// An item's hulls in shared memory.
constexpr int kHullBytes = 48;
static_assert(kMaxSlots * sizeof(Hull) <= kHullBytes, "");

// The sink logit of a query head, of a call that has some.
template <typename Element>
__device__ __forceinline__ float sink_logit(const Call& c, int h) {
  return c.sink_logits_fp32 ? static_cast<const float*>(c.sink_logits)[h]
                            : to_float(static_cast<const Element*>(c.sink_logits)[h]);
}

template <typename ELEMENT, int HEAD_DIM>
struct Shape {
  using Element = ELEMENT;
  static constexpr int D = HEAD_DIM;
  static constexpr int kRows = hopper::kRows, kKeys = 128, kWarpKeys = kKeys;
  static constexpr int kItems = 2;                 // under way at a time
  static constexpr int kStages = D == 64 ? 4 : 2;  // tiles of keys and values under way
  static constexpr int kMatrix = kKeys * D * 2, kQuery = kRows * D * 2;
  static constexpr int kPanels = D / 64;
  // from here on addresses in shared memory, from its beginning
  static constexpr int kItemFull = 0, kItemEmpty = 8 * kItems, kItemKnown = 16 * kItems, kKeysFull = 24 * kItems;
  static constexpr int kKeysEmpty = kKeysFull + 8 * kStages, kValuesFull = kKeysEmpty + 8 * kStages;
  static constexpr int kValuesEmpty = kValuesFull + 8 * kStages, kFetched = kValuesEmpty + 8 * kStages;
  static constexpr int kItem = (kFetched + 8 + 15) / 16 * 16;
  static constexpr int kHull = kItem + kItems * 16, kTile = kHull + kItems * kHullBytes;
  static constexpr int kBounds = kTile + kStages * 16, kBoundsBytes = kMaxSlots * kRows * 8;
  static constexpr int kQueries = (kBounds + kItems * kBoundsBytes + 1023) / 1024 * 1024;
  static constexpr int kTiles = kQueries + kItems * kQuery;
  static constexpr int kShared = kTiles + kStages * 2 * kMatrix;
  static_assert(D % 64 == 0 && sizeof(Item) <= 16 && sizeof(Keys) == 16, "");
};

// A place in a ring, and which time round it is.
template <int PLACES>
struct Ring {
  int at = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++at == PLACES) at = 0, phase ^= 1;
  }
  __device__ __forceinline__ Ring before() const {
    Ring ring;
    ring.at = at ? at - 1 : PLACES - 1, ring.phase = at ? phase : phase ^ 1;
    return ring;
  }
};

// A block's shared memory.
template <class S>
struct Room {
  char* memory;
  uint32_t base;

  __device__ __forceinline__ uint32_t item_full(int place) const { return base + S::kItemFull + place * 8; }
  __device__ __forceinline__ uint32_t item_empty(int place) const { return base + S::kItemEmpty + place * 8; }
  // what its rows see, before their queries are there
  __device__ __forceinline__ uint32_t item_known(int place) const { return base + S::kItemKnown + place * 8; }
  // all of the item at hand but its last tile has been asked for
  __device__ __forceinline__ uint32_t item_fetched() const { return base + S::kFetched; }
  __device__ __forceinline__ Item& item(int place) const {
    return *reinterpret_cast<Item*>(memory + S::kItem + place * 16);
  }
  __device__ __forceinline__ Hull* hulls(int place) const {
    return reinterpret_cast<Hull*>(memory + S::kHull + place * kHullBytes);
  }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return base + S::kKeysFull + stage * 8; }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return base + S::kKeysEmpty + stage * 8; }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return base + S::kValuesFull + stage * 8; }
  __device__ __forceinline__ uint32_t values_empty(int stage) const { return base + S::kValuesEmpty + stage * 8; }
  __device__ __forceinline__ Keys& tile(int stage) const {
    return *reinterpret_cast<Keys*>(memory + S::kTile + stage * 16);
  }
  // [begin, end) of the item's rows in one slot
  __device__ __forceinline__ int2* bounds(int place, int slot) const {
    return reinterpret_cast<int2*>(memory + S::kBounds + place * S::kBoundsBytes) + slot * S::kRows;
  }
  __device__ __forceinline__ uint32_t queries(int place) const { return base + S::kQueries + place * S::kQuery; }
  __device__ __forceinline__ uint32_t keys(int stage) const { return base + S::kTiles + stage * 2 * S::kMatrix; }
  __device__ __forceinline__ uint32_t values(int stage) const { return keys(stage) + S::kMatrix; }
};

}  // namespace sk::span_attention::hopper
