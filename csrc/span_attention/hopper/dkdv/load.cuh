// The warp that fetches: keys and values of an item, then the tiles of rows that see any of them.
#pragma once

#include "span_attention/hopper/dkdv/shape.cuh"
#include "span_attention/hopper/load.cuh"

namespace sk::span_attention::hopper::dkdv {

// Two runs of row blocks.
struct Runs {
  int begin[2], length[2];

  // Those of two neighbouring key blocks: of one run's both hulls, without what the first run has.
  __device__ __forceinline__ Runs(const int4& a, const int4& b) {
    const auto join = [](int b0, int e0, int b1, int e1, int& begin, int& end) {
      begin = b0 >= e0 ? b1 : b1 >= e1 ? b0 : min(b0, b1);
      end = b0 >= e0 ? e1 : b1 >= e1 ? e0 : max(e0, e1);
    };
    int end[2];
    join(a.x, a.y, b.x, b.y, begin[0], end[0]);
    join(a.z, a.w, b.z, b.w, begin[1], end[1]);
    // hulls may have come to overlap
    if (begin[0] < end[0]) begin[1] = max(begin[1], end[0]);
    length[0] = max(0, end[0] - begin[0]), length[1] = max(0, end[1] - begin[1]);
  }
  __device__ __forceinline__ int count() const { return length[0] + length[1]; }
  __device__ __forceinline__ int at(int i) const { return i < length[0] ? begin[0] + i : begin[1] + i - length[0]; }
};

template <class S>
struct Loader {
  const CUtensorMap *q, *dout, *k, *v;
  const Call& c;
  Room<S> room;
  Ring<S::kItems> place;
  Ring<S::kStages> stage;

  // How the rows of a block see keys [first, + 128).
  __device__ __forceinline__ int kind_of(int b, int block, int first) const {
    int kind = kNoMore;
    const int last = min(first + S::kRows, c.S);
    for (int slot = 0; slot < c.N; ++slot) {
      const int4 x = __ldg(c.row_blocks + (int64_t{b} * c.TB + block) * c.N + slot);
      if (x.x >= last || x.w <= first) continue;
      kind = kind == kNoMore && x.y <= first && x.z >= last ? kRowsWhole : kRowsMasked;
    }
    return kind;
  }

  __device__ __forceinline__ void fetch(int b, int h, int block, int kind) {
    const int lane = threadIdx.x % 32, s = stage.at;
    barrier_wait(room.empty(s), stage.phase ^ 1);
    if (kind == kRowsMasked) {
      for (int slot = 0; slot < kMaxSlots; ++slot) {
        for (int r = lane; r < S::kKeys; r += 32) {
          const int t = block * S::kKeys + r;
          int2 x = make_int2(0, 0);
          if (t < c.T && slot < c.N) x = __ldg(c.bounds + (int64_t{b} * c.T + t) * c.N + slot);
          room.bounds(s, slot)[r] = x;
        }
      }
      __syncwarp();
    }
    if (lane == 0) {
      room.kind(s) = kind;
      barrier_expect(room.full(s), 2 * S::kMatrix + S::kStatisticsBytes);
      load_rows<S, S::kKeys>(room.queries(s), q, room.full(s), block * S::kKeys, h, b);
      load_bytes(room.statistics_at(s), c.statistics + ((int64_t{b} * c.H + h) * c.TB + block) * S::kKeys,
                 S::kStatisticsBytes, room.full(s));
      load_rows<S, S::kKeys>(room.gradients(s), dout, room.full(s), block * S::kKeys, h, b);
    }
    stage.advance();
  }
  __device__ __forceinline__ void end_item() {
    barrier_wait(room.empty(stage.at), stage.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      room.kind(stage.at) = kNoMore;
      barrier_arrive(room.full(stage.at));
    }
    stage.advance();
  }

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % 32, group = c.H / c.HK, set_items = c.together * c.parts * c.tiles;
    int item = blockIdx.x;
    for (;;) {
      const bool more = item < c.items;
      const int next = draw(c.tickets, more);
      // early keys of all heads of a set first: causal rows see most of those
      const int set = item / set_items, rest = item - set * set_items, each = c.together * c.parts;
      const int tile = rest / each, of_tile = rest - tile * each, head = set * c.together + of_tile / c.parts;
      const int part = of_tile % c.parts, b = head / c.HK, hk = head - b * c.HK, first = tile * S::kRows;
      int4 blocks[2] = {};
      if (more) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (2 * tile + n < c.SB) blocks[n] = __ldg(c.key_blocks + int64_t{b} * c.SB + 2 * tile + n);
        }
      }
      barrier_wait(room.item_empty(place.at), place.phase ^ 1);
      const uint32_t full = room.item_full(place.at);
      if (lane == 0) {
        room.item(place.at) = more ? Item{b, hk, tile, part} : Item{-1, 0, 0, 0};
        if (more) {
          barrier_expect(full, 2 * S::kQuery);
          load_rows<S>(room.keys(place.at), k, full, first, hk, b);
          load_rows<S>(room.values(place.at), v, full, first, hk, b);
        } else {
          barrier_arrive(full);
        }
      }
      if (!more) break;
      place.advance();
      const Runs runs(blocks[0], blocks[1]);
      const int last = min(part * c.each + c.each, group);
      for (int h = hk * group + part * c.each; h < hk * group + last; ++h) {
        for (int begin = 0; begin < runs.count(); begin += 32) {
          // each lane looks at a block of rows
          const int i = begin + lane, own = i < runs.count() ? runs.at(i) : 0;
          const int kind = i < runs.count() ? kind_of(b, own, first) : kNoMore;
          for (unsigned todo = __ballot_sync(~0u, kind != kNoMore); todo != 0; todo &= todo - 1) {
            const int n = __ffs(todo) - 1;
            fetch(b, h, __shfl_sync(~0u, own, n), __shfl_sync(~0u, kind, n));
          }
        }
      }
      end_item();
      item = __shfl_sync(~0u, next, 0);
    }
    stop_drawing(c.tickets);
  }
};

}  // namespace sk::span_attention::hopper::dkdv
