// How a block of the dq kernel is made up: as the forward's (../shape.cuh), with do beside q, tiles of 64 keys, and
// three warps that make the rows' statistics while the fourth fetches.
#pragma once

#include "span_attention/hopper/shape.cuh"

namespace sk::span_attention::hopper::dq {

constexpr int kStatWarps = 3;

// Of a row: the logarithm of its denominator to base 2 (infinite for one that has seen nothing), and what is subtracted
// from do v: do o, less what comes through lse.
struct Statistics {
  float lse, delta;
};

// What a launch gives its blocks beside the forward's.
struct Inputs {
  const void *o, *dout;  // [B, H, T, D] by strides
  int64_t o_b, o_h, o_t, do_b, do_h, do_t;
  const float *lse, *dlse;  // [B, H, T]; dlse may be null
  Statistics* statistics;   // [B, H, rows], written
  float* sink_gradient;     // [B, H, T], written if there are sink logits
  float factor;             // of dq: the scale
  int rows;                 // of a head in `statistics`: T rounded up to a multiple of 64
};

template <typename ELEMENT, int HEAD_DIM>
struct Shape {
  using Element = ELEMENT;
  static constexpr int D = HEAD_DIM;
  static constexpr int kRows = hopper::kRows, kKeys = 64, kWarpKeys = kKeys;
  static constexpr int kItems = 2;
  static constexpr bool kGradients = true;
  static constexpr int kKeyStages = D == 64 ? 6 : 3, kValueStages = D == 64 ? 4 : 2;
  static constexpr int kMatrix = kKeys * D * 2, kQuery = kRows * D * 2;
  static constexpr int kPanels = D / 64;
  // barriers: of items and of stages
  static constexpr int kItemFull = 0, kItemEmpty = 8 * kItems, kItemKnown = 16 * kItems, kKeysFull = 24 * kItems;
  static constexpr int kKeysEmpty = kKeysFull + 8 * kKeyStages, kValuesFull = kKeysEmpty + 8 * kKeyStages;
  static constexpr int kValuesEmpty = kValuesFull + 8 * kValueStages, kItem = kValuesEmpty + 8 * kValueStages;
  static constexpr int kTile = kItem + kItems * 16;
  static constexpr int kStatistics = kTile + kKeyStages * 16;
  static constexpr int kBounds = kStatistics + kItems * kRows * 8, kBoundsBytes = kMaxSlots * kRows * 8;
  static constexpr int kQueries = (kBounds + kItems * kBoundsBytes + 1023) / 1024 * 1024;
  static constexpr int kKeyTiles = kQueries + kItems * 2 * kQuery;
  static constexpr int kValueTiles = kKeyTiles + kKeyStages * kMatrix;
  static constexpr int kShared = kValueTiles + kValueStages * kMatrix;
  static_assert(kShared <= 227 * 1024 && kItem % 16 == 0 && kTile % 16 == 0 && kStatistics % 16 == 0, "fits");
};

template <class S>
struct Room : KeyPlaces<S> {
  using KeyPlaces<S>::memory;
  using KeyPlaces<S>::base;

  // whose statistics are to be made
  __device__ __forceinline__ uint32_t item_known(int place) const { return base + S::kItemKnown + place * 8; }
  __device__ __forceinline__ Statistics* statistics(int place) const {
    return reinterpret_cast<Statistics*>(memory + S::kStatistics) + place * S::kRows;
  }
  __device__ __forceinline__ uint32_t queries(int place) const { return base + S::kQueries + place * 2 * S::kQuery; }
  __device__ __forceinline__ uint32_t gradients(int place) const { return queries(place) + S::kQuery; }
  __device__ __forceinline__ uint32_t keys(int stage) const { return base + S::kKeyTiles + stage * S::kMatrix; }
  __device__ __forceinline__ uint32_t values(int stage) const { return base + S::kValueTiles + stage * S::kMatrix; }
};

}  // namespace sk::span_attention::hopper::dq
