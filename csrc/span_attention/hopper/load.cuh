// The warp that fetches: which item the block takes next, which tiles of keys its rows see, and all of it into shared
// memory, as far ahead as there is room.
#pragma once

#include <climits>

#include "span_attention/hopper/shape.cuh"
#if defined(__CUDACC__)
#include "span_attention/hopper/ptx.cuh"
#include "streamkernels/barrier.cuh"
#endif

namespace sk::span_attention::hopper {

// Rows, panel by panel.
template <class S, int ROWS = kRows>
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap* map, uint32_t barrier, int row, int head,
                                          int b) {
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel) {
    load_box(to + panel * ROWS * 128, map, barrier, panel * 64, row, head, b);
  }
}

// What the rows of an item see in one slot.
struct Hull {
  int begin, end;             // of what some row sees
  int last_begin, first_end;  // of rows that see anything
  bool all;                   // whether every row sees something

  __device__ __forceinline__ bool gapless() const { return last_begin <= first_end; }
};

template <int EACH>
__device__ __forceinline__ Hull hull_of(const int2 (&rows)[EACH], int first_row, int T) {
  Hull x{INT_MAX, 0, 0, INT_MAX, true};
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    if (first_row + n * 32 >= T) continue;
    if (rows[n].x < rows[n].y) {
      x.begin = min(x.begin, rows[n].x), x.end = max(x.end, rows[n].y);
      x.last_begin = max(x.last_begin, rows[n].x), x.first_end = min(x.first_end, rows[n].y);
    } else {
      x.all = false;
    }
  }
  x.begin = __reduce_min_sync(~0u, x.begin), x.end = __reduce_max_sync(~0u, x.end);
  x.last_begin = __reduce_max_sync(~0u, x.last_begin), x.first_end = __reduce_min_sync(~0u, x.first_end);
  x.all = __all_sync(~0u, x.all);
  return x.begin < x.end ? x : Hull{0, 0, 0, 0, false};
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
    const int heads = c.together * c.blocks, set = item / heads, rest = item - set * heads;
    head = set * c.together + rest % c.together, b = head / c.H, h = head - b * c.H;
    block = c.blocks - 1 - rest / c.together;
  }
};

// What an item's rows see: a warp asks for it, and later knows what to fetch.
struct Sights {
  static constexpr int kEach = kRows / 32;
  int2 rows[kMaxSlots][kEach];

  __device__ __forceinline__ void fetch(const Call& c, const Place& at, bool really) {
#pragma unroll
    for (int slot = 0; slot < kMaxSlots; ++slot) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int t = at.block * kRows + n * 32 + threadIdx.x % 32;
        rows[slot][n] = make_int2(0, 0);
        if (really && t < c.T && slot < c.N) rows[slot][n] = __ldg(c.bounds + (int64_t{at.b} * c.T + t) * c.N + slot);
      }
    }
  }
  // To `bounds` in shared memory; the hulls of the slots, and how many tiles they are.
  template <int KEYS>
  __device__ __forceinline__ int put(const Call& c, const Place& at, Hull (&hulls)[kMaxSlots], int2* bounds) {
    const int lane = threadIdx.x % 32;
    int tiles = 0;
#pragma unroll
    for (int slot = 0; slot < kMaxSlots; ++slot) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        rows[slot][n] = make_int2(max(rows[slot][n].x, 0), min(rows[slot][n].y, c.S));
        bounds[slot * kRows + lane + n * 32] = rows[slot][n];
      }
      hulls[slot] = hull_of(rows[slot], at.block * kRows + lane, c.T);
      tiles += tiles_of<KEYS>(hulls[slot]);
    }
    return tiles;
  }
};

// Which item a warp takes when it is through with the one at hand: drawn by its first thread, ahead of time.
__device__ __forceinline__ int draw(int* tickets, bool more) {
  return more && threadIdx.x % 32 == 0 ? atomicAdd(tickets, 1) + static_cast<int>(gridDim.x) : 0;
}
// Every block has its last ticket before it is counted here; the last one leaves zeros.
__device__ __forceinline__ void stop_drawing(int* tickets) {
  if (threadIdx.x % 32 == 0 && atomicAdd(tickets + 1, 1) == static_cast<int>(gridDim.x) - 1)
    tickets[0] = tickets[1] = 0;
}

// Of the forward and of dq, which has do beside q, and lets others know of an item before it is there (item_known).
template <class S, class ROOM>
struct Loader {
  const CUtensorMap *q, *dout, *k, *v;
  const Call& c;
  ROOM room;
  Ring<S::kItems> place;
  Ring<S::kKeyStages> key_stage;
  Ring<S::kValueStages> value_stage;

  // One tile of keys and its values.
  __device__ __forceinline__ void fetch(const Keys& tile, int hk, int b) {
    if (threadIdx.x % 32 == 0) {
      const int i = key_stage.at, j = value_stage.at;
      barrier_wait(room.keys_empty(i), key_stage.phase ^ 1);
      room.tile(i) = tile;
      barrier_expect(room.keys_full(i), S::kMatrix);
      load_rows<S, S::kKeys>(room.keys(i), k, room.keys_full(i), tile.first, hk, b);
      barrier_wait(room.values_empty(j), value_stage.phase ^ 1);
      barrier_expect(room.values_full(j), S::kMatrix);
      load_rows<S, S::kKeys>(room.values(j), v, room.values_full(j), tile.first, hk, b);
    }
    key_stage.advance(), value_stage.advance();
  }

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % 32;
    int item = blockIdx.x;
    for (;;) {
      const bool more = item < c.items;
      const int next = draw(c.tickets, more);
      const Place at(c, item);
      Sights sights;
      sights.fetch(c, at, more);
      barrier_wait(room.item_empty(place.at), place.phase ^ 1);
      const uint32_t full = room.item_full(place.at);
      if (lane == 0) {
        room.item(place.at) = more ? Item{at.head, at.block, 0} : Item{-1, 0, -1};
        if constexpr (S::kGradients) barrier_arrive(room.item_known(place.at));
        if (more) {
          barrier_expect(full, (S::kGradients ? 2 : 1) * S::kQuery);
          load_rows<S>(room.queries(place.at), q, full, at.block * S::kRows, at.h, at.b);
          if constexpr (S::kGradients) {
            load_rows<S>(room.gradients(place.at), dout, full, at.block * S::kRows, at.h, at.b);
          }
        } else {
          barrier_arrive(full);
          barrier_arrive(full);
        }
      }
      if (!more) break;
      Hull hulls[kMaxSlots];
      const int tiles = sights.template put<S::kKeys>(c, at, hulls, room.bounds(place.at, 0));
      __syncwarp();
      if (lane == 0) {
        room.item(place.at).tiles = max(tiles, 1);
        barrier_arrive(full);
      }
      place.advance();
      const int hk = at.h / c.group;
#pragma unroll
      for (int slot = 0; slot < kMaxSlots; ++slot) {
        // at least one, that nobody sees
        const int n = slot == 0 && tiles == 0 ? 1 : tiles_of<S::kKeys>(hulls[slot]);
        for (int i = 0; i < n; ++i) fetch(tile_of<S::kKeys>(hulls[slot], slot, i), hk, at.b);
      }
      item = __shfl_sync(~0u, next, 0);
    }
    stop_drawing(c.tickets);
  }
};

}  // namespace sk::span_attention::hopper
