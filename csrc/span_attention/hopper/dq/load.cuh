// The warps that do not multiply: one fetches, as the forward's (../load.cuh), q and do of an item and its tiles of
// keys and values; the others make the statistics of its rows.
#pragma once

#include "span_attention/hopper/dq/shape.cuh"
#include "span_attention/hopper/load.cuh"

namespace sk::span_attention::hopper::dq {

template <class S>
struct Loader {
  const CUtensorMap *q, *dout, *k, *v;
  const Call& c;
  Room<S> room;
  Ring<S::kItems> place;
  Ring<S::kKeyStages> key_stage;
  Ring<S::kValueStages> value_stage;

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
      if (!more) {
        if (lane == 0) {
          room.item(place.at) = {-1, 0, -1};
          barrier_arrive(room.item_known(place.at));
          barrier_arrive(full);
          barrier_arrive(full);
        }
        break;
      }
      if (lane == 0) {
        room.item(place.at) = {at.head, at.block, 0};
        barrier_arrive(room.item_known(place.at));
        barrier_expect(full, 2 * S::kQuery);
        load_rows<S>(room.queries(place.at), q, full, at.block * S::kRows, at.h, at.b);
        load_rows<S>(room.gradients(place.at), dout, full, at.block * S::kRows, at.h, at.b);
      }
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
        const int n = tiles_of<S::kKeys>(hulls[slot]);
        for (int i = 0; i < n; ++i) fetch(tile_of<S::kKeys>(hulls[slot], slot, i), hk, at.b);
      }
      // a tile that nobody sees
      if (tiles == 0) fetch({0, 0, 0, 0, kShort}, hk, at.b);
      item = __shfl_sync(~0u, next, 0);
    }
    stop_drawing(c.tickets);
  }
};

// Half a warp has a row at a time: lse in powers of two, and the sum of do o - dlse.
template <class S>
struct Statistician {
  using Element = typename S::Element;
  const Call& c;
  const Inputs& in;
  Room<S> room;
  Ring<S::kItems> place;
  static constexpr int kLanes = S::D / 8;  // of a row: 16 bytes each
  static constexpr int kAtOnce = 32 / kLanes;

  static __device__ __forceinline__ float product(const uint4& a, const uint4& b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low[2], high[2];
      unpack<Element>(x[i], low[0], high[0]);
      unpack<Element>(y[i], low[1], high[1]);
      sum += low[0] * low[1] + high[0] * high[1];
    }
    return sum;
  }

  __device__ __forceinline__ void run(int warp) {
    const int lane = threadIdx.x % 32, chunk = lane % kLanes;
    for (;;) {
      barrier_wait(room.item_known(place.at), place.phase);
      const Item item = room.item(place.at);
      if (item.head < 0) {
        if (lane == 0) barrier_arrive(room.item_full(place.at));
        return;
      }
      const int b = item.head / c.H, h = item.head - b * c.H;
      const auto* o = static_cast<const Element*>(in.o) + b * in.o_b + h * in.o_h + chunk * 8;
      const auto* dout = static_cast<const Element*>(in.dout) + b * in.do_b + h * in.do_h + chunk * 8;
      Statistics* const to = room.statistics(place.at);
#pragma unroll 2
      for (int r = warp * kAtOnce + lane / kLanes; r < S::kRows; r += kStatWarps * kAtOnce) {
        const int t = item.block * S::kRows + r;
        const bool real = t < c.T;
        float delta = 0.f, lse = -INFINITY, dlse = 0.f;
        const int64_t row = int64_t{item.head} * c.T + t;
        if (real) {
          delta = product(__ldg(reinterpret_cast<const uint4*>(o + t * in.o_t)),
                          __ldg(reinterpret_cast<const uint4*>(dout + t * in.do_t)));
          lse = __ldg(in.lse + row);
          if (in.dlse != nullptr) dlse = __ldg(in.dlse + row);
        }
#pragma unroll
        for (int n = kLanes / 2; n > 0; n /= 2) delta += __shfl_xor_sync(~0u, delta, n);
        // whoever sees nothing weighs nothing
        const Statistics x{lse == -INFINITY ? INFINITY : lse * kLog2E, delta - dlse};
        if (chunk == 0) {
          to[r] = x;
          if (t < in.rows) in.statistics[int64_t{item.head} * in.rows + t] = x;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(room.item_full(place.at));
      place.advance();
    }
  }
};

}  // namespace sk::span_attention::hopper::dq
