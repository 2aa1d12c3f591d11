// token_scores for fp16 and bf16, in three sums per key:
//
//   mass = sum a,   d = sum a (o . v),   n = sum a^2 |v|^2,
//   norm = sqrt(n),   cosine = (|o|^2 - d) / (|o| |o - c|),   |o - c|^2 = |o|^2 - 2 d + n
//
// The cosine comes from its sine while that is small (scores.cuh), and scores keep what products cut off (walk.cuh).
// Where |o - c|^2 is less than half of |o|^2 that difference loses digits: such keys, of which few can be in a row, are
// done again by the whole block, and the contribution is subtracted before it is squared.
//
// Blocks stay: each copies q and o once and takes turns with the others over the keys.
#pragma once

#include "streamkernels/overlap.cuh"
#include "token_scores/walk.cuh"

namespace sk::token_scores {

// The cosine of one key by all threads of the block, the contribution subtracted first; valid in all of them.
template <typename Element>
__device__ __forceinline__ float subtracted(const Params& p, const TilePlan& plan, int b, int64_t token, float whole,
                                            float (&shared)[2][kMaxTileWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int R = p.H / p.HK;
  float left = 0.0f, along = 0.0f;
#pragma unroll 1
  for (int64_t head = warp; head < p.H; head += plan.warps) {
    const int64_t h = head / R;
    const Element* k = static_cast<const Element*>(p.k.data) + b * p.k.batch + h * p.k.head + token * p.k.row;
    const Element* v = static_cast<const Element*>(p.v.data) + b * p.v.batch + h * p.v.head + token * p.v.row;
    const Element *q = head_of<Element>(p.q, b, head), *o = head_of<Element>(p.o, b, head);
    float s = 0.0f;
#pragma unroll 1
    for (int i = lane; i < p.D; i += 32) s = fmaf(to_float(k[i]), to_float(q[i]), s);
    const float a = probability(p, sum_over_warp(s), lse_of(p, b, head));
#pragma unroll 1
    for (int i = lane; i < p.D; i += 32) {
      const float e = fmaf(-a, to_float(v[i]), to_float(o[i]));
      left = fmaf(e, e, left);
      along = fmaf(e, to_float(o[i]), along);
    }
  }
  left = sum_over_warp(left);
  along = sum_over_warp(along);
  if (lane == 0) {
    shared[0][warp] = left;
    shared[1][warp] = along;
  }
  __syncthreads();
  left = along = 0.0f;
#pragma unroll 1
  for (int w = 0; w < plan.warps; ++w) {
    left += shared[0][w];
    along += shared[1][w];
  }
  __syncthreads();
  return cosine_of(left, along, whole);
}

__device__ __forceinline__ void over_corners(TileSums& sums) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sums.along += __shfl_xor_sync(kAll, sums.along, step);
    sums.own += __shfl_xor_sync(kAll, sums.own, step);
    sums.mass += __shfl_xor_sync(kAll, sums.mass, step);
  }
}

// The scores of one tile from the sums of its parts; four lanes have a key, and each of them a quarter of the parts.
// Whether this lane's key is to be done again.
__device__ __forceinline__ bool finish(const Params& p, const TilePlan& plan, int b, int64_t tile, int token,
                                       float whole, const TileSums* parts) {
  const int lane = threadIdx.x % 32;
  TileSums total{0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int i = lane % 4; i < plan.parts; i += 4) {
    const TileSums& x = parts[i * kTileKeys + lane / 4];
    total.along += x.along;
    total.own += x.own;
    total.mass += x.mass;
  }
  over_corners(total);
  const int64_t entry = tile + lane / 4, place = static_cast<int64_t>(b) * p.K + entry;
  Scores scores{1.0f, 0.0f, 0.0f};
  bool marked = false;
  if (token >= 0) {
    const float left = whole - 2.0f * total.along + total.own;
    marked = left < 0.5f * whole;
    scores = {cosine_of_sums(total.along, total.own, left, whole), sqrtf(total.own), total.mass};
  }
  if (lane % 4 == 0 && entry < p.K) {
    p.cosine[place] = scores.cosine;
    p.norm[place] = scores.norm;
    p.mass[place] = scores.mass;
  }
  return marked;
}

template <typename Element, int STEPS>
__global__ void __launch_bounds__(32 * kMaxTileWarps, 1)
    token_scores_tiles_kernel(const __grid_constant__ Params p, const __grid_constant__ TilePlan plan) {
  __shared__ TileSums shared[kMaxTileWarps * kTileKeys];
  __shared__ float squares[kMaxTileWarps], again[2][kMaxTileWarps];
  __shared__ unsigned marks[kMaxTileWarps];
  wait_for_launch_before();
  let_next_launch_begin();
  const int b = static_cast<int>(blockIdx.x) / plan.blocks_of_row,
            block = static_cast<int>(blockIdx.x) % plan.blocks_of_row;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp & (plan.parts - 1);
  const List list(p, b);
  const int64_t stride = static_cast<int64_t>(plan.blocks_of_row) * plan.keys;
  const int slot = (warp >> plan.shift) * kTileKeys;
  int token = list[static_cast<int64_t>(block) * plan.keys + slot + lane / 4];
  const Queries<Element, STEPS> rows(dynamic_memory(), p.H);
  rows.copy(p, b, STEPS < kAnySteps || plan.vectors);
  uint4* const memory = dynamic_memory() + (tile_query_bytes(p.H, STEPS) + warp * STEPS * kTileStepBytes) / 16;
  Walk<Element, STEPS> walk(p, plan, rows, memory, b, token);
  walk.begin(part);
  // while the keys are on their way
  wait_copies<2>();
  const float square = sum_over_warp(rows.reorder(p));
  if (lane == 0) squares[warp] = square;
  __syncthreads();
  const float whole = sum_over_warp(lane < plan.warps ? squares[lane] : 0.0f);
  for (int64_t begin = static_cast<int64_t>(block) * plan.keys; begin < p.K; begin += stride) {
    const int next_token = list[begin + stride + slot + lane / 4];
    TileSums sums{0.0f, 0.0f, 0.0f};
    if (begin + slot < list.count) sums = walk.sums(part, next_token, begin + stride + slot < list.count);
    over_corners(sums);
    if (lane % 4 == 0) shared[warp * kTileKeys + lane / 4] = sums;
    __syncthreads();
    if (part == 0) {
      const bool marked = finish(p, plan, b, begin + slot, token, whole, shared + warp * kTileKeys);
      const unsigned all = __ballot_sync(kAll, marked && lane % 4 == 0);
      if (lane == 0) marks[warp] = all;
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < plan.warps; w += plan.parts) {
#pragma unroll 1
      for (unsigned left = marks[w]; left != 0; left &= left - 1) {
        const int64_t entry = begin + (w >> plan.shift) * kTileKeys + (__ffs(left) - 1) / 4;
        const float cosine = subtracted<Element>(p, plan, b, list[entry], whole, again);
        if (threadIdx.x == 0) p.cosine[static_cast<int64_t>(b) * p.K + entry] = cosine;
      }
    }
    token = next_token;
  }
  wait_copies<0>();
}

}  // namespace sk::token_scores
