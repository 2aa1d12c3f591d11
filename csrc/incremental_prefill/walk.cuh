// The old keys of an item: runs of tiles that its rows see, the walk of a block over them, and the loads of a tile.
#pragma once

#include "incremental_prefill/attend.cuh"
#include "incremental_prefill/instance.h"
#include "incremental_prefill/merge.cuh"

namespace sk::incremental_prefill {

// Neighbouring tiles of one segment, as the rows of one item see them. All bounds are stream indices.
struct Run {
  int segment, first, tiles;
  int whole_low, whole_high;  // keys in this range can be loaded without looking at each
  int free_low, free_high;    // keys in this range are seen by every row
  int unused;
};

// Run i of four: source sinks, source, target sinks, target; its part of the old tiles `old`, without those that no row
// of the item sees.
template <class S>
__device__ __forceinline__ Run run_of(const Params& p, const Session& session, const Hull& hull, Range old, int i) {
  const int segment = i / 2;
  const bool sinks = i % 2 == 0;
  const View& view = session.views[segment];
  const Tiles& tiles = session.tiles[segment];
  const int before = (segment ? session.tiles[0].count() : 0) + (sinks ? 0 : tiles.sinks);
  const int n = sinks ? tiles.sinks : tiles.tiles, base = sinks ? 0 : tiles.first;
  const int low = segment ? hull.begin_min[1] : hull.begin_min[0];
  const int high = least(segment ? hull.end_max[1] : hull.end_max[0], view.held);
  const int all_end = least(segment ? hull.end_min[1] : hull.end_min[0], view.held);
  int begin = base + least(most(old.begin - before, 0), n), end = base + least(most(old.end - before, 0), n);
  end = least(end, ceil_div(high, S::kKeys));
  if (!sinks) begin = most(begin, low / S::kKeys);
  Run run;
  run.segment = segment;
  run.first = begin * S::kKeys;
  run.tiles = most(end - begin, 0);
  run.whole_low = sinks ? 0 : low;
  run.whole_high = least(sinks ? least(view.sinks, high) : high, p.segments[segment].capacity);
  run.free_low = sinks ? 0 : segment ? hull.begin_max[1] : hull.begin_max[0];
  run.free_high = sinks ? least(view.sinks, all_end) : all_end;
  run.unused = 0;
  return run;
}

// What a block keeps of its item in shared memory, where it costs no registers during the products.
struct Job {
  Target at;
  int valid;               // rows of the tile
  int item, begin, steps;  // of all items of a session; first step in the list of all; steps
  int worker;              // by the order of the steps
  int share, now, until, each;
  bool empty;        // the share ends before the item's first tile
  Range fresh, old;  // tiles of this block
};

// What a warp keeps of it.
struct Item {
  Run runs[4];
  Hull hull;
};

// Walks over the tiles of the runs [0, 4).
struct Cursor {
  const Run* runs;
  int run = -1, left = 0, key = 0;

  // true if another run was entered
  __device__ __forceinline__ bool next(int keys) {
    key += keys;
    if (--left > 0) return false;
    do {
      ++run;
      left = runs[run].tiles;
    } while (left == 0);
    key = runs[run].first;
    return true;
  }
  // One tile on in the same run.
  __device__ __forceinline__ void step(int keys) {
    key += keys;
    --left;
  }
  // How many of the next tiles of this run have their first `part` keys in [low, high); 0 or less for none.
  __device__ __forceinline__ int plain(int low, int high, int keys, int part) const {
    const int first = key + keys;
    return first < low ? 0 : least(left - 1, (high - part - first + keys) / keys);
  }
};

// Loads the tiles of one item: each thread always the same chunks of the same rows of its group's part of a tile.
template <class S>
struct Loader {
  using Element = typename S::Element;
  static constexpr int kTotal = S::kWarpKeys * S::kChunks;
  static constexpr bool kEven = S::kGroup % S::kChunks == 0;  // a thread stays in its column
  static constexpr int kStep = kEven ? S::kGroup / S::kChunks : 1;

  Cursor cursor;
  int begin, row, chunk;
  uint32_t place;      // of the thread's first chunk in a tile
  bool dense = false;  // rows lie side by side
  int whole_low = 0, whole_high = 0;
  const Element *k, *v;  // the thread's first chunks of the tile at the cursor

  __device__ __forceinline__ explicit Loader(const Run* runs)
      : cursor{runs},
        begin(threadIdx.x / S::kGroup * S::kWarpKeys),
        row(threadIdx.x % S::kGroup / S::kChunks),
        chunk(threadIdx.x % S::kGroup % S::kChunks),
        place(chunk_at<S::D, S::kKeys>(begin + row, chunk)) {}

  // Starts the loads of the next tile into a stage.
  __device__ __forceinline__ void issue(const Params& p, const Session& session, const Hull& hull, int b, int hk,
                                        uint32_t stage, uint64_t keep) {
    if (cursor.next(S::kKeys)) {
      const Run& run = cursor.runs[cursor.run];
      const Segment& s = p.segments[run.segment];
      whole_low = run.whole_low, whole_high = run.whole_high;
      dense = s.k.row == S::D && s.v.row == S::D;
      const int first = cursor.key + begin + row;
      k = static_cast<const Element*>(s.k.data) + b * s.k.batch + hk * s.k.head + first * s.k.row + chunk * 8;
      v = static_cast<const Element*>(s.v.data) + b * s.v.batch + hk * s.v.head + first * s.v.row + chunk * 8;
    } else {
      const Segment& s = p.segments[cursor.runs[cursor.run].segment];
      k += S::kKeys * s.k.row, v += S::kKeys * s.v.row;
    }
    const int first = cursor.key + begin;
    const bool whole = kEven && first >= whole_low && first + S::kWarpKeys <= whole_high;
    const Segment& segment = p.segments[cursor.runs[cursor.run].segment];
#pragma unroll 1
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Rows& rows = matrix ? segment.v : segment.k;
      const uint32_t tile = stage + matrix * S::kMatrix;
      if (whole) {
        copy_rows(tile, matrix ? v : k, rows.row, keep);
      } else {
        slowly(p, session, hull, static_cast<const Element*>(rows.data) + b * rows.batch + hk * rows.head, rows.row,
               tile, first, threadIdx.x % S::kGroup, keep);
      }
    }
  }

  // How many of the next tiles `issue_plain` can load.
  __device__ __forceinline__ int plain() const {
    return kEven && dense ? cursor.plain(whole_low - begin, whole_high - begin, S::kKeys, S::kWarpKeys) : 0;
  }
  __device__ __forceinline__ void issue_plain(uint32_t stage, uint64_t keep) {
    cursor.step(S::kKeys);
    k += S::kKeys * S::D, v += S::kKeys * S::D;
    copy_rows(stage, k, S::D, keep);
    copy_rows(stage + S::kMatrix, v, S::D, keep);
  }

  // The group's part of a tile whose rows may all be read.
  __device__ __forceinline__ void copy_rows(uint32_t tile, const Element* from, int64_t stride, uint64_t keep) const {
    const uint32_t to = tile + place;
#pragma unroll
    for (int j = 0; j < kTotal / S::kGroup; ++j) {
      // kStep rows on: the row's place in its group of eight may change, by a constant
      copy_async<S::kEager>((to ^ (j * kStep % 8 * 16)) + j * kStep * 128, from + j * kStep * stride, true, keep);
    }
  }

  // The same for any tile, row by row. Rows that must not be read become zeros: what they hold may be NaN.
  __device__ __forceinline__ void slowly(const Params& p, const Session& session, const Hull& hull, const Element* from,
                                         int64_t stride, uint32_t to, int first, int thread, uint64_t keep) {
    const int segment = cursor.runs[cursor.run].segment;
    const View& view = session.views[segment];
    const int low = segment ? hull.begin_min[1] : hull.begin_min[0];
    const int high = least(segment ? hull.end_max[1] : hull.end_max[0], view.held);
    const int capacity = p.segments[segment].capacity;
    const bool ring = p.segments[segment].window > 0;
#pragma unroll 2
    for (int i = thread; i < kTotal; i += S::kGroup) {
      const int row = i / S::kChunks, chunk = i % S::kChunks, index = first + row;
      const bool seen = index < high && (index >= low || index < view.sinks);
      const int slot = seen ? slot_of(index, capacity, p.ring_sinks, ring) : kNoSlot;
      const bool valid = slot != kNoSlot;
      copy_async<S::kEager>(to + chunk_at<S::D, S::kKeys>(begin + row, chunk),
                            from + (valid ? slot : 0) * stride + chunk * 8, valid, keep);
    }
  }
};

// After a wait for one's own loads: all loads of the group's part of the tile have arrived, and all of its warps are
// done with the tile before.
template <class S>
__device__ __forceinline__ void tile_barrier() {
  if constexpr (S::kWgmma) publish();
  if constexpr (S::kGroup == 32) {
    __syncwarp();
  } else if constexpr (S::kGroup == S::kThreads) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;\n" ::"r"(1 + threadIdx.x / S::kGroup), "n"(S::kGroup) : "memory");
  }
}
template <class S>
__device__ __forceinline__ void block_barrier() {
  if constexpr (S::kWgmma) publish();
  __syncthreads();
}

}  // namespace sk::incremental_prefill
