// How a block of the dk and dv kernel is made up: two warpgroups that have 64 keys each, one warp that fetches rows.
#pragma once

#include "span_attention/hopper/dq/shape.cuh"

namespace sk::span_attention::hopper::dkdv {

// What a launch gives its blocks.
struct Call {
  const int2* bounds;                   // [B, T, N]
  const int4 *row_blocks, *key_blocks;  // [B, TB, N], [B, SB] (prepare)
  const dq::Statistics* statistics;     // [B, H, TB * 64]
  float4* partials;                     // [items, 2, D / 8, kReaders]
  int *tickets, *counters;              // [2]; [B * HK * tiles], zero between launches
  int H, HK, T, S, N, TB, SB;
  int tiles, parts, each;  // tiles of 128 keys; the query heads of a key head in parts, `each` of them a part
  int items, together;     // key heads that run together
  float scale, factor;     // of scores, times log2(e); of dk
};

// An item: 128 keys of a key head, and a part of its query heads.
struct Item {
  int b, hk, tile, part;  // b < 0: there are no more items
};
// A tile of 64 rows.
constexpr int kNoMore = 0, kRowsMasked = 1, kRowsWhole = 2;

template <typename ELEMENT, int HEAD_DIM>
struct Shape {
  using Element = ELEMENT;
  static constexpr int D = HEAD_DIM;
  // as products have them: rows are the keys that stay, keys the rows that pass
  static constexpr int kRows = 128, kKeys = 64, kWarpKeys = kKeys;
  static constexpr int kItems = 2, kStages = D == 64 ? 4 : 2;
  static constexpr int kMatrix = kKeys * D * 2, kQuery = kRows * D * 2;
  static constexpr int kPanels = D / 64;
  static constexpr int kLoaderRegisters = D == 64 ? 88 : 56, kReaderRegisters = D == 64 ? 208 : 224;
  static constexpr int kStatisticsBytes = kKeys * 8, kBoundsBytes = kMaxSlots * kKeys * 8;
  static constexpr int kItemFull = 0, kItemEmpty = 8 * kItems, kFull = 16 * kItems, kEmpty = kFull + 8 * kStages;
  static constexpr int kItem = kEmpty + 8 * kStages, kKind = kItem + 16 * kItems, kFlag = kKind + 4 * kStages;
  static constexpr int kStatistics = (kFlag + 4 + 127) / 128 * 128;
  static constexpr int kBounds = kStatistics + kStages * kStatisticsBytes;
  static constexpr int kKept = (kBounds + kStages * kBoundsBytes + 1023) / 1024 * 1024;  // keys and values of items
  static constexpr int kPassing = kKept + kItems * 2 * kQuery;                           // q and do of rows
  static constexpr int kShared = kPassing + kStages * 2 * kMatrix;
  static_assert(kShared <= 227 * 1024 && kItem % 16 == 0, "fits");
};

template <class S>
struct Room : Places<S, Item> {
  using Places<S, Item>::memory;
  using Places<S, Item>::base;

  __device__ __forceinline__ uint32_t full(int stage) const { return base + S::kFull + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return base + S::kEmpty + stage * 8; }
  __device__ __forceinline__ uint32_t keys(int place) const { return base + S::kKept + place * 2 * S::kQuery; }
  __device__ __forceinline__ uint32_t values(int place) const { return keys(place) + S::kQuery; }
  __device__ __forceinline__ uint32_t queries(int stage) const { return base + S::kPassing + stage * 2 * S::kMatrix; }
  __device__ __forceinline__ uint32_t gradients(int stage) const { return queries(stage) + S::kMatrix; }

  __device__ __forceinline__ int& kind(int stage) const { return reinterpret_cast<int*>(memory + S::kKind)[stage]; }
  __device__ __forceinline__ int& flag() const { return *reinterpret_cast<int*>(memory + S::kFlag); }
  __device__ __forceinline__ uint32_t statistics_at(int stage) const {
    return base + S::kStatistics + stage * S::kStatisticsBytes;
  }
  __device__ __forceinline__ const float4* statistics(int stage) const {
    return reinterpret_cast<const float4*>(memory + S::kStatistics + stage * S::kStatisticsBytes);
  }
  // of a slot's rows
  __device__ __forceinline__ int2* bounds(int stage, int slot) const {
    return reinterpret_cast<int2*>(memory + S::kBounds + stage * S::kBoundsBytes) + slot * S::kKeys;
  }
};

}  // namespace sk::span_attention::hopper::dkdv
