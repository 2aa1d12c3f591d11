// A warpgroup of the dk and dv kernel: 64 keys of an item, all rows that see any of them, of all its query heads.
// Scores are made with the keys as rows, so weights and their gradients are left sides of the products that follow as
// they lie in registers (FlashAttention-2, arXiv 2307.08691, algorithm 2, by keys).
#pragma once

#include "span_attention/hopper/attend.cuh"
#include "span_attention/hopper/dkdv/load.cuh"

namespace sk::span_attention::hopper::dkdv {

#if SK_WGMMA

template <class S>
struct Reader {
  using Element = typename S::Element;
  using Scores = float[S::kKeys / 8][4];
  using Weights = uint32_t[S::kKeys / 16][4];
  const CUtensorMap *to_dk, *to_dv;
  const Call& c;
  Room<S> room;
  State<S> dk, dv;
  Ring<S::kItems> place;
  Ring<S::kStages> stage;

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }

  // Which of the thread's scores are seen in a slot: bit 4 n + j is s[n][j].
  __device__ __forceinline__ uint32_t look(int slot, int first) const {
    const int key = first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const int4* const bounds = reinterpret_cast<const int4*>(room.bounds(stage.at, slot)) + threadIdx.x % 4;
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      const int4 x = bounds[4 * n];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = key + 8 * i;
        if (at >= x.x && at < x.y) seen |= 1u << (4 * n + 2 * i);
        if (at >= x.z && at < x.w) seen |= 2u << (4 * n + 2 * i);
      }
    }
    return seen;
  }

  // What is not seen becomes `hidden`.
  static __device__ __forceinline__ void hide(Scores& s, uint32_t seen, float hidden) {
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(seen & 1u << (4 * n + j))) s[n][j] = hidden;
      }
    }
  }

  // A tile of rows; false if there are no more.
  __device__ __forceinline__ bool step(uint32_t k, uint32_t v, int first) {
    barrier_wait(room.full(stage.at), stage.phase);
    const int kind = __shfl_sync(~0u, room.kind(stage.at), 0);
    if (kind == kNoMore) {
      arrive(room.empty(stage.at));
      stage.advance();
      return false;
    }
    const uint32_t q = low_word(room.queries(stage.at), 16), dout = low_word(room.gradients(stage.at), 16);
    const uint32_t q_below = low_word(room.queries(stage.at), S::kKeys * 128),
                   dout_below = low_word(room.gradients(stage.at), S::kKeys * 128);
    Scores s, dp;
    open_products();
    begin_scores<S, S::kKeys>(s, k, q);
    close_products();
    begin_scores<S, S::kKeys>(dp, v, dout);
    close_products();
    uint32_t seen = 0, twice = 0;
    if (kind != kRowsWhole) {
#pragma unroll 1
      for (int slot = 0; slot < c.N; ++slot) {
        const uint32_t own = look(slot, first);
        twice |= seen & own, seen |= own;
      }
    }
    const float4* const statistics = room.statistics(stage.at) + threadIdx.x % 4;
    wait_products<1>();
    if (kind != kRowsWhole) hide(s, seen, -INFINITY);
    Weights p, ds;
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      const float4 x = statistics[4 * n];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = exp2_fast(fmaf(s[n][j], c.scale, -(j % 2 ? x.z : x.x)));
    }
    if (__builtin_expect(__any_sync(~0u, twice != 0), 0)) {
      // slots that overlap count twice
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (twice & 1u << (4 * n + j)) s[n][j] *= 2.f;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) p[n / 2][n % 2 * 2 + i] = pack<Element>(s[n][2 * i], s[n][2 * i + 1]);
    }
    wait_products<0>();
    if (kind != kRowsWhole) hide(dp, seen, 0.f);
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      const float4 x = statistics[4 * n];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] *= dp[n][j] - (j % 2 ? x.w : x.y);
#pragma unroll
      for (int i = 0; i < 2; ++i) ds[n / 2][n % 2 * 2 + i] = pack<Element>(s[n][2 * i], s[n][2 * i + 1]);
    }
    open_products();
    begin_values<S, S::kKeys>(dv, p, dout_below);
    begin_values<S, S::kKeys>(dk, ds, q_below);
    finish_products();
    arrive(room.empty(stage.at));
    stage.advance();
    return true;
  }

  // Parts of an item are left for whoever is last, who adds them up in their order: whether that is this block.
  __device__ __forceinline__ bool join(const Item& item) {
    const int64_t which = (int64_t{item.b} * c.HK + item.hk) * c.tiles + item.tile;
    constexpr int kFours = S::D / 8;  // float4s of a thread's dk, and of its dv
    float4* const first = c.partials + which * c.parts * 2 * kFours * kReaders + threadIdx.x;
    float4* own = first + int64_t{item.part} * 2 * kFours * kReaders;
#pragma unroll
    for (int n = 0; n < kFours; ++n) {
      own[n * kReaders] = make_float4(dk.o[n][0], dk.o[n][1], dk.o[n][2], dk.o[n][3]);
      own[(kFours + n) * kReaders] = make_float4(dv.o[n][0], dv.o[n][1], dv.o[n][2], dv.o[n][3]);
    }
    __threadfence();
    meet<kReaders>(kReadersMeet);
    if (threadIdx.x == 0) {
      const bool last = atomicAdd(c.counters + which, 1) == c.parts - 1;
      if (last) c.counters[which] = 0;
      room.flag() = last;
      __threadfence();
    }
    meet<kReaders>(kReadersMeet);
    if (!room.flag()) return false;
    dk.clear(), dv.clear();
#pragma unroll 1
    for (int part = 0; part < c.parts; ++part) {
      const float4* from = first + int64_t{part} * 2 * kFours * kReaders;
#pragma unroll
      for (int n = 0; n < kFours; ++n) {
        const float4 x = __ldcg(from + n * kReaders), y = __ldcg(from + (kFours + n) * kReaders);
        dk.o[n][0] += x.x, dk.o[n][1] += x.y, dk.o[n][2] += x.z, dk.o[n][3] += x.w;
        dv.o[n][0] += y.x, dv.o[n][1] += y.y, dv.o[n][2] += y.z, dv.o[n][3] += y.w;
      }
    }
    return true;
  }

  __device__ __forceinline__ void store(const Item& item) {
    const int warp = threadIdx.x / 32;
    // all warps of the group have read its keys and values
    meet<kGroup>(kGroupMeets + warp / 4);
    const uint32_t keys = room.keys(place.at) + warp * 16 * 128, values = room.values(place.at) + warp * 16 * 128;
    const float factor[2] = {c.factor, c.factor}, one[2] = {1.f, 1.f};
    store_rows<S>(dk, factor, keys);
    store_rows<S>(dv, one, values);
    publish();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      const int key = item.tile * S::kRows + warp * 16;
      store_panels<S>(to_dk, keys, key, item.hk, item.b);
      store_panels<S>(to_dv, values, key, item.hk, item.b);
      close_stores();
    }
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      barrier_wait(room.item_full(place.at), place.phase);
      const Item item = room.item(place.at);
      if (__shfl_sync(~0u, item.b, 0) < 0) return;
      const uint32_t group = threadIdx.x / kGroup * 64 * 128;
      const uint32_t k = low_word(room.keys(place.at) + group, 16), v = low_word(room.values(place.at) + group, 16);
      dk.clear(), dv.clear();
#pragma unroll 1
      while (step(k, v, item.tile * S::kRows)) {
      }
      if (c.parts == 1 || join(item)) store(item);
      if (threadIdx.x % 32 == 0) {
        wait_until_read();
        barrier_arrive(room.item_empty(place.at));
      }
      place.advance();
    }
  }
};

#endif

}  // namespace sk::span_attention::hopper::dkdv
