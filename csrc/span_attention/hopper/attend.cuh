// A warpgroup of the Hopper kernel: 64 rows of an item, all tiles of its keys. Scores of a tile are multiplied while
// the values of the tile before are, and weighed while those still are.
#pragma once

#include "span_attention/hopper/load.cuh"
#if defined(__CUDACC__)
#include "streamkernels/mma.cuh"
#include "streamkernels/wgmma.cuh"
#endif

namespace sk::span_attention::hopper {

#if SK_WGMMA

constexpr int kReadersMeet = 1, kGroupMeets = 2;  // barriers; the second one for each warpgroup

// Zeros for values that no row sees: they may be NaN. By all readers, who have the same tiles.
template <class S>
__device__ __noinline__ void clean_values(char* values, const int2* bounds, Keys tile) {
  meet<kReaders>(kReadersMeet);
  for (int key = threadIdx.x; key < S::kKeys; key += kReaders) {
    bool seen = tile.first + key < tile.end;
    if (seen && tile.kind == kHoles) {
      seen = false;
      for (int r = 0; r < S::kRows && !seen; ++r)
        seen = tile.first + key >= bounds[r].x && tile.first + key < bounds[r].y;
    }
    if (seen) continue;
    // whole rows of the panels: where a chunk lies in its row does not matter
    for (int c = 0; c < S::D / 8; ++c) {
      *reinterpret_cast<uint4*>(values + c / 8 * S::kKeys * 128 + key * 128 + c % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  publish();
  meet<kReaders>(kReadersMeet);
}

// Which keys of the tile the thread's two rows see: key 8 n + 2 (lane % 4) + j is bit 2 n + j. `bounds`: of the item's
// rows in the tile's slot.
__device__ __forceinline__ uint32_t below(int key) {
  const int bits = max(key, 0) / 8 * 2 + min(max(key, 0) % 8, 2);
  return bits >= 32 ? ~0u : (1u << bits) - 1;
}
template <class S>
__device__ __forceinline__ void look(const int2* bounds, const Keys& tile, uint32_t (&seen)[2]) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = tile.first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int2 x = bounds[row + 8 * i];
    seen[i] = below(x.y - column) & ~below(max(x.x, tile.fresh) - column);
  }
}
// What they do not see becomes `hidden`.
template <class S>
__device__ __forceinline__ void hide(float (&s)[S::kKeys / 8][4], const uint32_t (&seen)[2], float hidden) {
#pragma unroll
  for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!(seen[j / 2] & 1u << (2 * n + j % 2))) s[n][j] = hidden;
    }
  }
}

// A warp's 16 rows of a state, times a factor for each row, to panels in shared memory; `rows`: the first one's
// address.
template <class S>
__device__ __forceinline__ void store_rows(const State<S>& state, const float (&factor)[2], uint32_t rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < S::D / 8; n += 2) {
    const uint32_t x[4] = {pack<typename S::Element>(state.o[n][0] * factor[0], state.o[n][1] * factor[0]),
                           pack<typename S::Element>(state.o[n][2] * factor[1], state.o[n][3] * factor[1]),
                           pack<typename S::Element>(state.o[n + 1][0] * factor[0], state.o[n + 1][1] * factor[0]),
                           pack<typename S::Element>(state.o[n + 1][2] * factor[1], state.o[n + 1][3] * factor[1])};
    const int chunk = n + lane / 16;
    store_matrices(rows + chunk / 8 * S::kRows * 128 + lane % 16 * 128 + (chunk % 8 ^ lane % 8) * 16, x);
  }
}

// And from there to a tensor, by one thread.
template <class S>
__device__ __forceinline__ void store_panels(const CUtensorMap* map, uint32_t rows, int row, int head, int b) {
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel) {
    store_box(map, rows + panel * S::kRows * 128, panel * 64, row, head, b);
  }
}

template <class S>
struct Reader {
  using Element = typename S::Element;
  using Scores = float[S::kKeys / 8][4];
  using Weights = uint32_t[S::kKeys / 16][4];
  const CUtensorMap* o;
  const Call& c;
  Room<S> room;
  State<S> state;
  Weights weights;
  Keys before;  // the tile that they are of
  Ring<S::kItems> place;
  Ring<S::kStages> stage;  // of the next scores
  uint32_t q;
  // of one row's keys in a thread: weights by old maxima are taken while they are no more
  static constexpr float kMostSum = 4096.f;

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }
  __device__ __forceinline__ uint32_t keys_word(int stage) const { return low_word(room.keys(stage), 16); }
  __device__ __forceinline__ uint32_t values_word(int stage) const {
    return low_word(room.values(stage), S::kKeys * 128);
  }

  // What scores are weighed by. A row that has seen nothing: what it sees first is far too large for it, and what it
  // does not see is nothing.
  __device__ __forceinline__ float shift(int i) const { return fmaxf(state.m[i], -1e30f); }

  // The weights of both rows, their sums, and whether those of all rows of the warp are small.
  __device__ __forceinline__ bool weigh_by(const float (&shift)[2], const Scores& s, Weights& own,
                                           float (&sum)[2]) const {
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = exp2_fast(fmaf(s[n][j], c.scale, -shift[j / 2]));
      sum[0] += x[0] + x[1], sum[1] += x[2] + x[3];
      own[n / 2][n % 2 * 2] = pack<Element>(x[0], x[1]);
      own[n / 2][n % 2 * 2 + 1] = pack<Element>(x[2], x[3]);
    }
    return !__any_sync(~0u, !(sum[0] <= kMostSum) || !(sum[1] <= kMostSum));
  }
  // Scores become weights by the maxima so far: those of new scores are not even looked for unless the sum of a row's
  // weights says that they are far larger. That row's maximum is raised then, or all if FIRST: true, and what the sums
  // before must be multiplied by. No row depends on what others have seen.
  template <bool FIRST>
  __device__ __forceinline__ bool weigh_scores(const Scores& s, Weights& own, float (&alpha)[2]) {
    bool raised = FIRST;
    float sum[2];
    alpha[0] = alpha[1] = 1.f;
    if (FIRST) raise<S>(state, s, c.scale, alpha, 0.f);
    float by[2] = {shift(0), shift(1)};
#pragma unroll 1
    while (!weigh_by(by, s, own, sum) && !raised) {
      const float m[2] = {state.m[0], state.m[1]}, l[2] = {state.l[0], state.l[1]};
      raise<S>(state, s, c.scale, alpha, 0.f);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int small = sum[i] <= kMostSum;
        small &= __shfl_xor_sync(~0u, small, 1);
        small &= __shfl_xor_sync(~0u, small, 2);
        if (small) state.m[i] = m[i], state.l[i] = l[i], alpha[i] = 1.f;
        by[i] = shift(i);
      }
      raised = true;
    }
    state.l[0] += sum[0], state.l[1] += sum[1];
    return raised;
  }

  // The next tile of the item.
  __device__ __forceinline__ void follow() {
    Scores s;
    const Ring<S::kStages> old = stage.before();
    barrier_wait(room.keys_full(stage.at), stage.phase);
    const Keys tile = read_once(room.tile(stage.at));
    barrier_wait(room.values_full(old.at), old.phase);
    clean(old.at);
    const uint32_t k = keys_word(stage.at), v = values_word(old.at);
    open_products();
    begin_scores<S, S::kKeys>(s, q, k);
    close_products();
    begin_values<S, S::kKeys>(state, weights, v);
    close_products();
    uint32_t seen[2];
    if (tile.kind != kWhole) look<S>(room.bounds(place.at, tile.slot), tile, seen);
    wait_products<1>();
    arrive(room.keys_empty(stage.at));
    if (tile.kind != kWhole) hide<S>(s, seen, -INFINITY);
    Weights own;
    float alpha[2];
    const bool raised = weigh_scores<false>(s, own, alpha);
    wait_products<0>();
    arrive(room.values_empty(old.at));
    if (__builtin_expect(raised, 0)) rescale<S>(state, alpha);
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = apart(own[n][i]);
    }
    before = tile;
    stage.advance();
  }

  __device__ __forceinline__ void clean(int old) const {
    if (__builtin_expect(before.kind < kShort, 1)) return;
    clean_values<S>(room.memory + (room.values(old) - room.base), room.bounds(place.at, before.slot), before);
  }

  // o and lse of an item. o goes through the shared memory of the queries, whose turn is over.
  __device__ __forceinline__ void store(int place, const Item& item) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int b = item.head / c.H, h = item.head - b * c.H, first = item.block * S::kRows + warp * 16;
    float gate[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float l = state.l[i];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const float lse = l == 0.f ? -INFINITY : (state.m[i] + log2_fast(l)) * kLn2;
      gate[i] = l == 0.f ? 0.f : __fdividef(1.f, l);
      if (c.sink_logits != nullptr && l != 0.f) {
        gate[i] = __fdividef(gate[i], 1.f + __expf(sink_logit<Element>(c, h) - lse));
      }
      const int t = first + lane / 4 + 8 * i;
      if (lane % 4 == 0 && t < c.T) c.lse[int64_t{item.head} * c.T + t] = lse;
    }
    // all warps of the group have read the queries
    meet<kGroup>(kGroupMeets + warp / 4);
    const uint32_t rows = room.queries(place) + warp * 16 * 128;
    store_rows<S>(state, gate, rows);
    publish();
    __syncwarp();
    if (lane == 0) {
      store_panels<S>(o, rows, first, h, b);
      close_stores();
    }
  }
  // Gives an item's place back, once what was stored from there has been read: every thread has read bounds there.
  __device__ __forceinline__ void leave(int place) const {
    if (threadIdx.x % 32 == 0) wait_until_read();
    barrier_arrive(room.item_empty(place));
  }
  // What one lane reads for its warp is read before that lane arrives: others' reads would take a barrier of the warp.
  template <typename T>
  static __device__ __forceinline__ T read_once(const T& from) {
    static_assert(sizeof(T) == 16, "");
    uint4 x = make_uint4(0, 0, 0, 0);
    if (threadIdx.x % 32 == 0) memcpy(&x, &from, sizeof(x));
    x.x = __shfl_sync(~0u, x.x, 0), x.y = __shfl_sync(~0u, x.y, 0);
    x.z = __shfl_sync(~0u, x.z, 0), x.w = __shfl_sync(~0u, x.w, 0);
    T found;
    memcpy(&found, &x, sizeof(T));
    return found;
  }

  // The last values of the item at hand beside the first scores of the next: how many tiles that one has, or a negative
  // number. Both are multiplied in any case, of whatever lies there: ptxas serialises products that branches surround.
  __device__ __forceinline__ int turn(bool first) {
    const Ring<S::kStages> old = stage.before();
    const int done_at = place.at;
    Item done{};
    if (!first) {
      barrier_wait(room.values_full(old.at), old.phase);
      clean(old.at);
      done = read_once(room.item(done_at));
      place.advance();
    }
    barrier_wait(room.item_full(place.at), place.phase);
    const int tiles = read_once(room.item(place.at)).tiles;
    const bool more = tiles >= 0;
    if (more) {
      barrier_wait(room.keys_full(stage.at), stage.phase);
      before = read_once(room.tile(stage.at));
    }
    q = low_word(room.queries(place.at) + threadIdx.x / kGroup * 64 * 128, 16);
    const uint32_t k = keys_word(stage.at), v = values_word(old.at);
    Scores s;
    open_products();
    begin_values<S, S::kKeys>(state, weights, v);
    close_products();
    begin_scores<S, S::kKeys>(s, q, k);
    close_products();
    uint32_t seen[2];
    if (more && before.kind != kWhole) look<S>(room.bounds(place.at, before.slot), before, seen);
    wait_products<1>();
    if (!first) {
      arrive(room.values_empty(old.at));
      store(done_at, done);
    }
    wait_products<0>();
    if (more) {
      arrive(room.keys_empty(stage.at));
      stage.advance();
      if (before.kind != kWhole) hide<S>(s, seen, -INFINITY);
      state.clear();
      float alpha[2];
      weigh_scores<true>(s, weights, alpha);
    }
    if (!first) leave(done_at);
    return tiles;
  }

  __device__ __forceinline__ void run() {
    state.clear();
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n) weights[n][0] = weights[n][1] = weights[n][2] = weights[n][3] = 0;
#pragma unroll 1
    for (bool first = true;; first = false) {
      const int tiles = turn(first);
      if (tiles < 0) return;
#pragma unroll 1
      for (int j = 1; j < tiles; ++j) follow();
    }
  }
};

#endif

}  // namespace sk::span_attention::hopper
