// A warpgroup of the dq kernel: 64 rows of an item, all tiles of its keys. Scores and do v^T of a tile are multiplied
// while dq of the tile before is; weights come from lse, so nothing is looked for (FlashAttention-2, arXiv 2307.08691,
// algorithm 2, by rows).
#pragma once

#include "span_attention/hopper/attend.cuh"
#include "span_attention/hopper/dq/statistics.cuh"

namespace sk::span_attention::hopper::dq {

#if SK_WGMMA

// Zeros for keys that no row sees: they may be NaN, and dq adds them up. By all readers, who have the same tiles.
template <class S>
__device__ __forceinline__ void clean_keys(const Room<S>& room, int place, int stage, const Keys& tile) {
  if (__builtin_expect(tile.kind < kShort, 1)) return;
  clean_values<S>(room.memory + (room.keys(stage) - room.base), room.bounds(place, tile.slot), tile);
}

template <class S>
struct Reader {
  using Element = typename S::Element;
  using Scores = float[S::kKeys / 8][4];
  using Weights = uint32_t[S::kKeys / 16][4];
  const CUtensorMap* dq;
  const Call& c;
  const Inputs& in;
  Room<S> room;
  State<S> state;  // o is dq
  Weights weights;
  float lse[2], delta[2];
  Ring<S::kItems> place;
  Ring<S::kKeyStages> key_stage;
  Ring<S::kValueStages> value_stage;
  uint32_t q, dout;

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }

  // Scores become weights, and what the scores' gradients are times them: ds = p (dp - delta), packed.
  __device__ __forceinline__ void weigh(Scores& s) const {
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = exp2_fast(fmaf(s[n][j], c.scale, -lse[j / 2]));
    }
  }
  __device__ __forceinline__ void derive(const Scores& p, const Scores& dp, Weights& own) const {
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        own[n / 2][n % 2 * 2 + i] =
            pack<Element>(p[n][2 * i] * (dp[n][2 * i] - delta[i]), p[n][2 * i + 1] * (dp[n][2 * i + 1] - delta[i]));
      }
    }
  }

  // The scores of a tile and do v^T, and what they make of them; of an item's FIRST tile alone, of any other beside
  // what the one before adds to dq.
  template <bool FIRST>
  __device__ __forceinline__ void step(Weights& own) {
    Scores s, dp;
    barrier_wait(room.keys_full(key_stage.at), key_stage.phase);
    const Keys tile = room.tile(key_stage.at);
    clean_keys(room, place.at, key_stage.at, tile);
    barrier_wait(room.values_full(value_stage.at), value_stage.phase);
    const uint32_t k = low_word(room.keys(key_stage.at), 16), v = low_word(room.values(value_stage.at), 16);
    const int before = key_stage.before().at;
    const uint32_t old = low_word(room.keys(before), S::kKeys * 128);
    open_products();
    begin_scores<S, S::kKeys>(s, q, k);
    close_products();
    begin_scores<S, S::kKeys>(dp, dout, v);
    close_products();
    if constexpr (!FIRST) {
      begin_values<S, S::kKeys>(state, weights, old);
      close_products();
    }
    uint32_t seen[2];
    if (tile.kind != kWhole) look<S>(room.bounds(place.at, tile.slot), tile, seen);
    wait_products<FIRST ? 1 : 2>();
    if (tile.kind != kWhole) hide<S>(s, seen, -INFINITY);
    weigh(s);
    wait_products<FIRST ? 0 : 1>();
    arrive(room.values_empty(value_stage.at));
    if (tile.kind != kWhole) hide<S>(dp, seen, 0.f);
    derive(s, dp, own);
    if constexpr (!FIRST) {
      // behind a branch: ptxas would wait first and work the weights out later
      if (tile.kind == kWhole) {
        wait_products<0>();
      } else {
        asm volatile("// not whole\n");
        wait_products<0>();
      }
      arrive(room.keys_empty(before));
    }
    key_stage.advance(), value_stage.advance();
  }
  template <bool FIRST>
  __device__ __forceinline__ void follow() {
    Weights own;
    step<FIRST>(own);
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = apart(own[n][i]);
    }
  }

  // What the last tile adds; then dq of the item.
  __device__ __forceinline__ void finish(const Item& item) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Ring<S::kKeyStages> old = key_stage.before();
    const uint32_t k = low_word(room.keys(old.at), S::kKeys * 128);
    open_products();
    begin_values<S, S::kKeys>(state, weights, k);
    finish_products();
    arrive(room.keys_empty(old.at));
    const int b = item.head / c.H, h = item.head - b * c.H, first = item.block * S::kRows + warp * 16;
    meet<kGroup>(kGroupMeets + warp / 4);
    const uint32_t rows = room.queries(place.at) + warp * 16 * 128;
    const float factor[2] = {in.factor, in.factor};
    store_rows<S>(state, factor, rows);
    publish();
    __syncwarp();
    if (lane == 0) {
      store_panels<S>(dq, rows, first, h, b);
      close_stores();
      wait_until_read();
      barrier_arrive(room.item_empty(place.at));
    }
  }

  __device__ __forceinline__ void run() {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    for (;;) {
      barrier_wait(room.item_full(place.at), place.phase);
      const Item item = room.item(place.at);
      const int tiles = __shfl_sync(~0u, item.tiles, 0);
      if (tiles < 0) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Statistics x = room.statistics(place.at)[row + 8 * i];
        lse[i] = x.lse, delta[i] = x.delta;
      }
      q = low_word(room.queries(place.at) + threadIdx.x / kGroup * 64 * 128, 16);
      dout = low_word(room.gradients(place.at) + threadIdx.x / kGroup * 64 * 128, 16);
      state.clear();
      follow<true>();
#pragma unroll 1
      for (int j = 1; j < tiles; ++j) follow<false>();
      finish(item);
      place.advance();
    }
  }
};

#endif

}  // namespace sk::span_attention::hopper::dq
