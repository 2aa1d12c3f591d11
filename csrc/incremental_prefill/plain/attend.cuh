// One warpgroup over its tiles of the block.
#pragma once

#include "incremental_prefill/attend.cuh"
#include "incremental_prefill/plain/join.cuh"
#include "incremental_prefill/plain/load.cuh"

namespace sk::incremental_prefill {

#if SK_WGMMA

// Hides the keys of a tile below `low` and from `high` on, of the thread's two rows.
template <int KEYS>
__device__ __forceinline__ void mask_outside(float (&s)[KEYS / 8][4], int low, const int (&high)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = column + 8 * n + j % 2;
      if (key < low || key >= high[j / 2]) s[n][j] = -INFINITY;
    }
  }
}

// What a thread's weights of a tile and two rows may sum to: fp16 holds any of them, and maxima that were raised
// suffice for scores that grow by eight bits more.
constexpr float kMostSum = 4096.f;

template <class S>
struct Attention {
  using Element = typename S::Element;
  using Layout = PlainLayout<S>;
  using Scores = float[S::kKeys / 8][4];
  using Weights = uint32_t[S::kKeys / 16][4];

  const Params& p;
  const Plan& plan;
  const Walk& walk;
  const Rank& rank;
  uint32_t base;
  State<S>& state;
  int ragged = walk.last_of_source(S::kKeys), whole = walk.last_whole(S::kKeys);

  // What the products read: addresses, and how far panels lie apart.
  __device__ __forceinline__ uint32_t queries() const {
    const int row = threadIdx.x / 32 % (4 * S::kRowGroups) / 4 * 64;
    return low_word(base + Layout::kQueries + row * 128, 16);
  }
  __device__ __forceinline__ uint32_t keys(const Turn& at) const {
    return low_word(base + Layout::kStages + at.stage * S::kStage, 16);
  }
  __device__ __forceinline__ uint32_t values(const Turn& at) const {
    return low_word(base + Layout::kStages + at.stage * S::kStage + S::kMatrix, S::kKeys * 128);
  }

  __device__ __forceinline__ void give_back(uint32_t barrier) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }
  // All there is to do for a tile's weights, but for what is left of the tile before.
  __device__ __forceinline__ void score(Scores& s, uint32_t q, const Turn& at) const {
    barrier_wait(full<S>(base, at), at.phase);
    publish();
    const uint32_t k = keys(at);
    open_products();
    begin_scores<S, S::kKeys>(s, q, k);
    finish_products();
    give_back(empty<S>(base, at));
  }
  __device__ __forceinline__ void add(const Weights& w, const Turn& at) const {
    barrier_wait(full<S>(base, at) + 8, at.phase);
    publish();
    const uint32_t v = values(at);
    open_products();
    begin_values<S, S::kKeys>(state, w, v);
    finish_products();
    give_back(empty<S>(base, at) + 8);
  }

  // Caps and masks the scores of tile j.
  __device__ __forceinline__ void finish_scores(Scores& s, int j) const {
    if (__builtin_expect(plan.inner != 0.f, 0)) cap_scores<S>(s, plan.inner, plan.outer);
    if (__builtin_expect(j != ragged && j < whole, 1)) return;
    const bool fresh = j == walk.old_tiles();
    const int left = fresh ? 0 : walk.left(j, S::kKeys);
    int high[2] = {left, left};
    if (fresh) {
      // rows see those before them, but none that has no room
      const int room = least(p.segments[p.segment].capacity - walk.length, p.T);
      const int row = rank.at.first_row + threadIdx.x / 32 % (4 * S::kRowGroups) * 16 + threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) high[i] = least(divide_by_R(plan, row + 8 * i) + 1, room);
    }
    mask_outside<S::kKeys>(s, fresh ? -walk.length : 0, high);
  }

  // Weights by the maxima as they are, and what they add to l; false if they are of no use, since maxima must be raised
  // first. Sums show what maxima would, without a comparison for each score and an exchange between lanes: where a
  // weight is too large its sum is.
  __device__ __forceinline__ bool weigh_as_is(const Scores& s, Weights& w) const {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = exp2_fast(fmaf(s[n][j], plan.scale, -state.m[j / 2]));
      sum[0] += x[0] + x[1], sum[1] += x[2] + x[3];
      w[n / 2][n % 2 * 2] = pack<Element>(x[0], x[1]);
      w[n / 2][n % 2 * 2 + 1] = pack<Element>(x[2], x[3]);
    }
    // NaN is not below anything: of a row that has seen nothing yet, or of what it sees
    if (__any_sync(~0u, !(sum[0] + sum[1] <= kMostSum))) return false;
    state.l[0] += sum[0], state.l[1] += sum[1];
    return true;
  }

  // The same with maxima that are these scores' or higher, and what o must be multiplied by.
  __device__ __forceinline__ void weigh_anew(Scores& s, Weights& w, float (&alpha)[2]) const {
    alpha[0] = alpha[1] = 1.f;
    raise<S>(state, s, plan.scale, alpha, 0.f);
    weigh<S>(state, s, plan.scale);
    pack_weights<S>(s, w);
  }

  // Tile by tile, for warpgroups that share out the keys: memory is what they wait for, and a tile's place is given
  // back before the next one is waited for.
  __device__ __forceinline__ void one_by_one(int j, int tiles) {
    Scores s;
    Weights weights;
    const uint32_t q = queries();
    Turn at;
    at.advance(j, plan.stages);
    bool first = true;
#pragma unroll 1
    for (; j < tiles; j += S::kKeyGroups, at.advance(S::kKeyGroups, plan.stages)) {
      score(s, q, at);
      finish_scores(s, j);
      if (first || !weigh_as_is(s, weights)) {
        float alpha[2];
        weigh_anew(s, weights, alpha);
        rescale<S>(state, alpha);
      }
      first = false;
      add(weights, at);
    }
  }

  // A tile of `pipelined`: adds the values of tile j - 1, which is `at`, by weights `w`, and leaves those of tile j.
  // `own` is `w` itself where there are no registers for two.
  static constexpr bool kTwoWeights = S::D <= 128;
  __device__ __forceinline__ void follow(uint32_t q, int j, Turn& at, const Weights& w, Weights& own) const {
    Scores s;
    const Turn before = at;
    at.advance(1, plan.stages);
    const uint32_t k = keys(at), v = values(before);
    // of the values before, too
    barrier_wait(full<S>(base, at), at.phase);
    publish();
    open_products();
    begin_scores<S, S::kKeys>(s, q, k);
    close_products();
    begin_values<S, S::kKeys>(state, w, v);
    close_products();
    wait_products<1>();
    give_back(empty<S>(base, at));
    finish_scores(s, j);
    // behind a branch: ptxas would wait for the values first and work the weights out later
    float alpha[2];
    if constexpr (!kTwoWeights) {
      const bool raised = raise<S>(state, s, plan.scale, alpha);
      weigh<S>(state, s, plan.scale);
      if (__builtin_expect(raised, 0)) {
        asm volatile("// raised\n");
        wait_products<0>();
        rescale<S>(state, alpha);
      } else {
        wait_products<0>();
      }
      pack_weights<S>(s, own);
    } else if (__builtin_expect(weigh_as_is(s, own), 1)) {
      wait_products<0>();
    } else {
      weigh_anew(s, own, alpha);
      wait_products<0>();
      rescale<S>(state, alpha);
    }
    give_back(empty<S>(base, before) + 8);
  }

  // For warpgroups that share out the rows, where products are most of the work: while a tile's values are added the
  // scores of the next one are weighed (FlashAttention-3, arXiv 2407.08608, section 3.2).
  __device__ __forceinline__ void pipelined(int tiles) {
    if (tiles == 0) return;
    Weights even, odd;  // two, since products read the one while the other is made
    const uint32_t q = queries();
    Turn at;
    {
      Scores s;
      score(s, q, at);
      finish_scores(s, 0);
      float alpha[2];  // of an o that is 0
      weigh_anew(s, even, alpha);
    }
    int j = 1;
    if constexpr (!kTwoWeights) {
#pragma unroll 1
      for (; j < tiles; ++j) follow(q, j, at, even, even);
    } else {
#pragma unroll 1
      for (; j + 1 < tiles; j += 2) {
        follow(q, j, at, even, odd);
        follow(q, j + 1, at, odd, even);
      }
      if (j < tiles) {
        follow(q, j, at, even, odd);
        return add(odd, at);
      }
    }
    add(even, at);
  }

  __device__ __forceinline__ void run() {
    // one value for the warp: products are under way across the loop's branches
    const int tiles = __shfl_sync(~0u, walk.tiles(), 0);
    if constexpr (S::kKeyGroups > 1) {
      one_by_one(__shfl_sync(~0u, threadIdx.x / 128, 0), tiles);
    } else {
      pipelined(tiles);
    }
  }
};

#endif

}  // namespace sk::incremental_prefill
