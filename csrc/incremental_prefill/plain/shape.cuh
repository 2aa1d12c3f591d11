// Sizes of the kernel for plain sessions (kernel.cuh), the tiles of a block, shared memory.
#pragma once

#include "incremental_prefill/instance.h"
#include "incremental_prefill/tiles.cuh"

namespace sk::incremental_prefill {

constexpr int kMostStages = 12;  // key tiles in shared memory

// READERS warpgroups attend and one loads. ROW_GROUPS: how many of them share out the rows, 64 each; what is left of
// them shares out the keys, tile by tile.
template <typename ELEMENT, int HEAD_DIM, int ROW_GROUPS, int READERS = 2>
struct PlainShape : Shape<ELEMENT, HEAD_DIM, 4 * ROW_GROUPS, 1, 64> {
  static constexpr int kRowGroups = ROW_GROUPS, kKeyGroups = READERS / ROW_GROUPS;
  static constexpr int kReaders = 128 * READERS, kLoaders = 128;  // threads
  static constexpr int kThreads = kReaders + kLoaders;
  static constexpr int kRow =
      (HEAD_DIM + 8) * 4;  // bytes of a row of o in parts, and from one to the next: banks differ
  // Warpgroups that share out the keys join what they have, a part of the columns each: blocks of 8 columns.
  static constexpr int kColumns = HEAD_DIM / 8;
  SK_HOST_DEVICE static constexpr int first_column(int group) { return kColumns * group / kKeyGroups; }
  // 16-byte places of a thread for what it hands over: columns, then m and l
  static constexpr int kPlaces = kKeyGroups > 1 ? kColumns - kColumns / kKeyGroups + 1 : 0;
  static constexpr int kExchange = kReaders * kPlaces * 16;
};

// The tiles of a block: [begin, end) of the old tiles, source before target, then the new rows if it has them.
struct Walk {
  int length;  // of the new rows' segment, far from overflow
  int held_source, held_target;
  int source_tiles;  // of the source segment
  Range old;
  int parts;  // clusters that share the item
  bool fresh;

  __device__ __forceinline__ int old_tiles() const { return old.end - old.begin; }
  __device__ __forceinline__ int tiles() const { return old_tiles() + fresh; }
  // The segment of the block's old tile j, its first key, and how many keys there are from there on.
  __device__ __forceinline__ bool is_target(int j) const { return old.begin + j >= source_tiles; }
  __device__ __forceinline__ int left(int j, int keys) const {
    return (is_target(j) ? held_target : held_source) - first_key(j, keys);
  }
  __device__ __forceinline__ int first_key(int j, int keys) const {
    const int i = old.begin + j;
    return (i >= source_tiles ? i - source_tiles : i) * keys;
  }
  // Tiles with keys that some rows do not see are this one, if there is one, and all from the other one on.
  __device__ __forceinline__ int last_of_source(int keys) const {
    return held_source % keys == 0 ? -1 : source_tiles - 1 - old.begin;
  }
  __device__ __forceinline__ int last_whole(int keys) const {
    const int n = old_tiles();
    return n > 0 && is_target(n - 1) && left(n - 1, keys) < keys ? n - 1 : n;
  }
};

// Bytes of shared memory: barriers, what loaders tell readers, (m, l) that blocks send for the rows that this one joins
// and the weights that come of them, queries, key tiles (later: this block's partial results). Behind them the partial
// results that the cluster's blocks send (Plan::inbox).
template <class S>
struct PlainLayout {
  static constexpr int kFull = 0, kEmpty = 16 * kMostStages, kReceived = 32 * kMostStages, kKnown = kReceived + 8;
  static constexpr int kTold = kKnown + 8;
  static constexpr int kFlag = kTold + 8, kWalk = kFlag + 8, kTouched = 512;
  // a place for each block's part of each row, at most a row more per block than the tile has
  static constexpr int kParts = S::kRows + 16, kStatistics = kTouched, kWeights = kStatistics + 8 * kParts;
  static constexpr int kQueries = 3072, kStages = kQueries + S::kQuery;
  static_assert(kWalk + sizeof(Walk) <= kTouched && kTouched + 4 * S::kThreads <= kQueries &&
                kWeights + 4 * kParts <= kQueries);
};

}  // namespace sk::incremental_prefill
