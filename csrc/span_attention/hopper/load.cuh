// Who fetches: which item the block takes next, which tiles of keys its rows see, and all of it into shared memory, as
// far ahead as there is room.
#pragma once

#include <climits>

#include "span_attention/hopper/shape.cuh"
#if defined(__CUDACC__)
#include "span_attention/hopper/ptx.cuh"
#include "streamkernels/barrier.cuh"
#endif

namespace sk::span_attention::hopper {

// Rows, panel by panel.
template <class S, int ROWS>
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap* map, uint32_t barrier, int row, int head,
                                          int b) {
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel) {
    load_box(to + panel * ROWS * 128, map, barrier, panel * 64, row, head, b);
  }
}

template <int KEYS>
__device__ __forceinline__ int tiles_of(const Hull& x) {
  return (x.end - x.begin + KEYS - 1) / KEYS;
}

// Tile i of a slot. Where no key of the hull is seen by nobody, the last one ends with it: what lies outside may be
// anything.
template <int KEYS>
__device__ __forceinline__ Keys tile_of(const Hull& x, int slot, int i) {
  const bool gapless = x.gapless(), solid = gapless && x.end - x.begin >= KEYS;
  Keys tile;
  tile.fresh = x.begin + i * KEYS;
  tile.first = solid ? min(tile.fresh, x.end - KEYS) : tile.fresh;
  tile.end = x.end;
  tile.slot = static_cast<int16_t>(slot);
  const bool whole =
      solid && x.all && tile.first == tile.fresh && tile.fresh >= x.last_begin && tile.fresh + KEYS <= x.first_end;
  tile.kind = static_cast<int16_t>(whole ? kWhole : solid ? kMasked : gapless ? kShort : kHoles);
  return tile;
}

// Which item the n-th one is: as many heads as have their keys in the L2 together, their last rows first, since those
// have most keys.
struct Place {
  int head, b, h, block;
  __device__ __forceinline__ Place(const Call& c, int item) {
    const int set = c.by_set.quotient(item), rest = item - set * c.together * c.blocks;
    const int row = c.by_together.quotient(rest);
    head = set * c.together + rest - row * c.together, block = c.blocks - 1 - row;
    b = c.by_heads.quotient(head), h = head - b * c.H;
  }
};

// A warp that finds out what the rows of the next item see, which takes some 3000 cycles, while the last tiles of the
// one at hand are multiplied. No sooner: whoever is first through with large items is to draw the small ones behind.
template <class S>
struct Scout {
  const CUtensorMap* q;
  const Call& c;
  Room<S> room;
  Ring<S::kItems> place;
  Ring<1> fetched;
  static constexpr int kEach = kRows / 32;

  // To shared memory: a slot's bounds, and its hull. How many tiles that is.
  __device__ __forceinline__ int look_at(const int2 (&rows)[kEach], int slot) const {
    int2* const bounds = room.bounds(place.at, slot) + threadIdx.x % 32;
    Hull x{INT_MAX, 0, 0, INT_MAX, true};
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int begin = max(rows[n].x, 0), end = min(rows[n].y, c.S);
      bounds[n * 32] = make_int2(begin, end);
      const bool sees = begin < end;
      x.begin = min(x.begin, sees ? begin : INT_MAX), x.end = max(x.end, sees ? end : 0);
      x.last_begin = max(x.last_begin, sees ? begin : 0), x.first_end = min(x.first_end, sees ? end : INT_MAX);
      x.all &= sees;
    }
    x.begin = __reduce_min_sync(~0u, x.begin), x.end = __reduce_max_sync(~0u, x.end);
    x.last_begin = __reduce_max_sync(~0u, x.last_begin), x.first_end = __reduce_min_sync(~0u, x.first_end);
    x.all = __all_sync(~0u, x.all);
    if (x.begin >= x.end) x = {0, 0, 0, 0, false};
    if (threadIdx.x % 32 == 0) room.hulls(place.at)[slot] = x;
    __syncwarp();
    return tiles_of<S::kKeys>(x);
  }

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % 32;
    int item = blockIdx.x;
#pragma unroll 1
    for (;;) {
      const bool more = item < c.items;
      barrier_wait(room.item_empty(place.at), place.phase ^ 1);
      const uint32_t full = room.item_full(place.at);
      if (!more) {
        if (lane == 0) {
          room.item(place.at) = {-1, 0, -1, 0};
          barrier_arrive(room.item_known(place.at));
          barrier_arrive(full);
        }
        barrier_arrive(full);
        break;
      }
      const Place at(c, item);
      // rows behind the last one see what that one does
      const int2* const from = c.bounds + int64_t{at.b} * c.T * c.N;
      int2 rows[kMaxSlots][kEach];
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int2* const row = from + min(at.block * kRows + n * 32 + lane, c.T - 1) * static_cast<unsigned>(c.N);
        rows[0][n] = __ldg(row);
        rows[1][n] = __ldg(row + (c.N > 1));
      }
      if (lane == 0) {
        barrier_expect(full, S::kQuery);
        load_rows<S, kRows>(room.queries(place.at), q, full, at.block * kRows, at.h, at.b);
      }
      __syncwarp();
      int tiles = look_at(rows[0], 0);
      if (c.N > 1) tiles += look_at(rows[1], 1);
      if (lane == 0) {
        // at least one, that nobody sees
        room.item(place.at) = {at.head, at.block, max(tiles, 1), 0};
        barrier_arrive(room.item_known(place.at));
      }
      // each lane has written bounds
      barrier_arrive(full);
      place.advance();
      barrier_wait(room.item_fetched(), fetched.phase);
      fetched.advance();
      if (lane == 0) item = atomicAdd(c.tickets, 1) + static_cast<int>(gridDim.x);
      item = __shfl_sync(~0u, item, 0);
    }
    // this block has drawn its last one; the last block to say so leaves zeros
    if (lane == 0 && atomicAdd(c.tickets + 1, 1) == static_cast<int>(gridDim.x) - 1) c.tickets[0] = c.tickets[1] = 0;
  }
};

// One thread, for which the scout has looked ahead.
template <class S>
struct Loader {
  const CUtensorMap *k, *v;
  const Call& c;
  Room<S> room;
  Ring<S::kItems> place;
  Ring<S::kStages> stage;

  // One tile of keys and its values.
  __device__ __forceinline__ void fetch(const Keys& tile, int hk, int b) {
    const int at = stage.at;
    barrier_wait(room.keys_empty(at), stage.phase ^ 1);
    room.tile(at) = tile;
    barrier_expect(room.keys_full(at), S::kMatrix);
    load_rows<S, S::kKeys>(room.keys(at), k, room.keys_full(at), tile.first, hk, b);
    barrier_wait(room.values_empty(at), stage.phase ^ 1);
    barrier_expect(room.values_full(at), S::kMatrix);
    load_rows<S, S::kKeys>(room.values(at), v, room.values_full(at), tile.first, hk, b);
    stage.advance();
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      barrier_wait(room.item_known(place.at), place.phase);
      const Item item = room.item(place.at);
      if (item.head < 0) return;
      const int b = c.by_heads.quotient(item.head), hk = c.by_group.quotient(item.head - b * c.H);
      const int last = item.tiles > 1;
      int left = item.tiles;
#pragma unroll 1
      for (int slot = 0; left > 0; ++slot) {
        const Hull hull = room.hulls(place.at)[slot];
        // the one tile of an item that sees nothing is the last slot's
        const int n = slot + 1 < c.N ? tiles_of<S::kKeys>(hull) : left;
#pragma unroll 1
        for (int i = 0; i < n; ++i) {
          fetch(tile_of<S::kKeys>(hull, slot, i), hk, b);
          if (--left == last) barrier_arrive(room.item_fetched());
        }
      }
      place.advance();
    }
  }
};

}  // namespace sk::span_attention::hopper
