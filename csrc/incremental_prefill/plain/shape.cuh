// Sizes and shared memory of the kernel for plain sessions (kernel.cuh).
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
  static constexpr int kRow = (HEAD_DIM + 8) * 4;  // bytes of a row's partial result: o, then m and l, then nothing
  // bytes that warpgroups with the same rows hand over to each other (join.cuh)
  static constexpr int kExchange = kKeyGroups > 1 ? kReaders * (HEAD_DIM / 16 + 1) * 16 : 0;
};

// Bytes of shared memory: barriers, queries, key tiles (later: this block's partial results). Behind them
// the partial results that the cluster's blocks send for the rows that this block joins (Plan::inbox).
template <class S>
struct PlainLayout {
  static constexpr int kFull = 0, kEmpty = 16 * kMostStages, kReceived = 32 * kMostStages;
  static constexpr int kFlag = kReceived + 8, kQueries = 1024, kStages = kQueries + S::kQuery;
  static_assert(kFlag + 4 <= kQueries, "fits");
};

}  // namespace sk::incremental_prefill
