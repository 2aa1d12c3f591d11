// Which keys a block goes through: its share of every slot's hull, found on the device from the spans.
#pragma once

#include "span_attention/params.h"
#include "span_attention/plan.h"

namespace sk::span_attention {

constexpr unsigned kAll = 0xffffffffu;

struct Range {
  int begin, end;
};

// The block's rows: t * R + r of one batch row and kv head, from `first`.
struct Tile {
  int b, hk, first, rows, R;

  // block `unit` of B * HK * tiles
  __device__ __forceinline__ Tile(const Params& p, int unit, int tiles, int most_rows)
      : b(unit / tiles / p.HK), hk(unit / tiles % p.HK), first(unit % tiles * most_rows), R(p.H / p.HK) {
    rows = min(most_rows, p.T * R - first);
  }

  __device__ __forceinline__ int row(int i) const { return (first + i) / R; }
  __device__ __forceinline__ int head(int i) const { return hk * R + (first + i) % R; }
};

// The first entry of an ascending list that is not below `key`; in [0, count] whatever the list holds. All lanes of a
// warp, which narrow the range 32-fold a step.
__device__ __forceinline__ int lower_bound(const int32_t* list, int64_t stride, int count, int key) {
  const int lane = threadIdx.x % 32;
  int begin = 0, end = count;
  while (begin < end) {
    const int step = (end - begin + 31) / 32;
    const int probe = begin + lane * step;
    const bool below = probe < end && list[probe * stride] < key;
    const int steps = __popc(__ballot_sync(kAll, below));
    if (steps == 0) break;
    end = min(end, begin + steps * step);
    begin += (steps - 1) * step + 1;
  }
  return begin;
}

// A kept list, what is asked for before the rows' spans are known.
struct Kept {
  const int32_t* list;
  int64_t stride;
  int count, low, high;  // of entries; the first and the last

  __device__ __forceinline__ Kept(const Params& p, const Tile& tile)
      : list(static_cast<const int32_t*>(p.kept.data) + tile.b * p.kept.batch + tile.hk * p.kept.head),
        stride(p.kept.row),
        count(p.K) {
    if (p.kept_count.data != nullptr) {
      const int32_t* counts = static_cast<const int32_t*>(p.kept_count.data);
      count = min(max(counts[tile.b * p.kept_count.batch + tile.hk * p.kept_count.row], 0), p.K);
    }
    low = p.K > 0 ? list[0] : 0;
    high = count > 0 ? list[(count - 1) * stride] : 0;
  }

  // The entries that lie in `hull`; mostly it holds the whole list.
  __device__ __forceinline__ Range inside(const Range& hull) const {
    if (count == 0) return {0, 0};
    const int begin = low >= hull.begin ? 0 : lower_bound(list, stride, count, hull.begin);
    const int end = high < hull.end ? count : lower_bound(list, stride, count, hull.end);
    return {begin, end};
  }
};

// One warp: the spans of the block's rows in slot n, clipped, to `spans`, and what of the slot the rows go through:
// keys, or entries of the kept list.
template <int ROWS>
__device__ __forceinline__ Range read_slot(const Params& p, const Tile& tile, int n, const Kept& kept,
                                           int2 (*spans)[kMaxSlots]) {
  const int lane = threadIdx.x % 32;
  Range hull{INT32_MAX, 0};
#pragma unroll
  for (int i = lane; i < ROWS; i += 32) {
    int2 span = make_int2(0, 0);
    if (i < tile.rows) {
      const int64_t at = (static_cast<int64_t>(tile.b) * p.T + tile.row(i)) * p.N + n;
      span = reinterpret_cast<const int2*>(p.bounds)[at];
      span = make_int2(max(span.x, 0), min(span.y, p.S));
    }
    if (span.x >= span.y) span = make_int2(0, 0);
    if (span.x < span.y) hull = {min(hull.begin, span.x), max(hull.end, span.y)};
    spans[i][n] = span;
  }
  hull.begin = __reduce_min_sync(kAll, hull.begin);
  hull.end = __reduce_max_sync(kAll, hull.end);
  if (hull.begin >= hull.end) return {0, 0};
  return p.rules[n] == kKept ? kept.inside(hull) : hull;
}

// Runs of keys in a range.
__device__ __forceinline__ int runs_in(const Range& range) {
  return (range.end - range.begin + kRun - 1) / kRun;
}

// One thread: cuts the slots' ranges down to the part of split `split`, in whole runs of keys.
__device__ __forceinline__ void take_share(Range* ranges, int N, int split, int splits) {
  unsigned total = 0;
  for (int n = 0; n < N; ++n) total += runs_in(ranges[n]);
  const unsigned each = total / splits, more = total % splits;  // the first `more` splits have one run more
  const int64_t first = int64_t{each} * split + min(static_cast<unsigned>(split), more);
  const int64_t last = first + each + (split < static_cast<int>(more));
  int64_t offset = 0;
  for (int n = 0; n < N; ++n) {
    const Range range = ranges[n];
    const int64_t runs = runs_in(range);
    const int64_t begin = max(first - offset, int64_t{0}), end = min(last - offset, runs);
    ranges[n].begin = begin < end ? range.begin + static_cast<int>(begin) * kRun : 0;
    ranges[n].end = begin < end ? static_cast<int>(min(int64_t{range.end}, range.begin + end * int64_t{kRun})) : 0;
    offset += runs;
  }
}

// The whole block: the spans of its rows, and its share of every slot's hull. Ends in a barrier.
template <int ROWS>
__device__ __forceinline__ void find_share(const Params& p, const Tile& tile, int split, int splits,
                                           int2 (*spans)[kMaxSlots], Range* ranges) {
  const Kept kept(p, tile);
  for (int n = threadIdx.x / 32; n < p.N; n += kWarps) {
    const Range range = read_slot<ROWS>(p, tile, n, kept, spans);
    if (threadIdx.x % 32 == 0) ranges[n] = range;
  }
  __syncthreads();
  if (threadIdx.x == 0) take_share(ranges, p.N, split, splits);
  __syncthreads();
}

// Walks over the tiles of a block's share: entries [at, at + kKeys) of slot n, up to the slot's end.
struct Cursor {
  int n, at;

  __device__ __forceinline__ void settle(const Range* ranges, int N) {
    while (n < N && at >= ranges[n].end) {
      ++n;
      at = n < N ? ranges[n].begin : 0;
    }
  }
  __device__ __forceinline__ void next(const Range* ranges, int N) {
    at += kKeys;
    settle(ranges, N);
  }
};

// The key of the i-th entry of a tile, or -1: none, or garbage.
__device__ __forceinline__ int key_of(const Params& p, const Tile& tile, const Cursor& cursor, const Range* ranges,
                                      int i) {
  if (cursor.n >= p.N || cursor.at + i >= ranges[cursor.n].end) return -1;
  const int entry = cursor.at + i;
  if (p.rules[cursor.n] != kKept) return entry;
  const int32_t* list = static_cast<const int32_t*>(p.kept.data) + tile.b * p.kept.batch + tile.hk * p.kept.head;
  const int key = list[entry * p.kept.row];
  return key >= 0 && key < p.S ? key : -1;
}

}  // namespace sk::span_attention
