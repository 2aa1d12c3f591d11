// token_scores for fp32: what every listed key contributes to the output of one query row, in one pass over k and v.
// With a the probability of a key in a head and e = o - a v, a key needs three sums over heads and head dim: e e, e o
// and a a v v, besides the sum of a. Only q k is needed before a is known, so a row costs one sum over lanes per head;
// the others stay in their lanes until all heads are done. Sums are taken in a fixed order: the same bits every time.
#pragma once

#include "streamkernels/overlap.cuh"
#include "token_scores/plan.h"
#include "token_scores/scores.cuh"

namespace sk::token_scores {

struct Sums {
  float left, along, own, mass;  // e e, e o, a a v v, a
};

template <int LANES, int CHUNKS>
struct Slot {
  static constexpr int kWidth = 16 / sizeof(float);
  Piece<float> k[CHUNKS], v[CHUNKS];

  // one row of k and v; `first` is this lane's first column
  __device__ __forceinline__ void load(const float* k_row, const float* v_row, int first, int D, bool live,
                                       bool vectors) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = first + c * LANES * kWidth;
      clear(k[c]);
      clear(v[c]);
      if (!live || column >= D) continue;
      if (vectors) {
        k[c].load_streaming(k_row + column);
        v[c].load_streaming(v_row + column);
      } else {
        load_elements(k[c], k_row + column);
        load_elements(v[c], v_row + column);
      }
    }
  }

  // folds one query head into the sums
  __device__ __forceinline__ void fold(const Params& p, const float* q, const float* o, float lse, int first, bool live,
                                       bool vectors, Sums& sums) const {
    Piece<float> q_piece[CHUNKS], o_piece[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = first + c * LANES * kWidth;
      clear(q_piece[c]);
      clear(o_piece[c]);
      if (!live || column >= p.D) continue;
      if (vectors) {
        q_piece[c].load(q + column);
        o_piece[c].load(o + column);
      } else {
        load_elements(q_piece[c], q + column);
        load_elements(o_piece[c], o + column);
      }
    }
    float s = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      float x[kWidth], y[kWidth];
      k[c].unpack(x);
      q_piece[c].unpack(y);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) s = fmaf(x[i], y[i], s);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) s += __shfl_xor_sync(kAll, s, step);
    const float a = probability(p, s, lse);
    if (!live) return;
    float square = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      float x[kWidth], y[kWidth];
      v[c].unpack(x);
      o_piece[c].unpack(y);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float e = fmaf(-a, x[i], y[i]);
        sums.left = fmaf(e, e, sums.left);
        sums.along = fmaf(e, y[i], sums.along);
        square = fmaf(x[i], x[i], square);
      }
    }
    sums.own = fmaf(a * a, square, sums.own);
    sums.mass += a;
  }
};

template <int LANES, int CHUNKS>
__global__ void __launch_bounds__(kThreads, CHUNKS == 1 ? 2 : 1)
    token_scores_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  constexpr int kGroups = 32 / LANES, kWidth = 16 / sizeof(float);
  __shared__ Sums shared[kMaxParts * kGroups];
  __shared__ float squares[kWarps];
  const int b = blockIdx.x / plan.tiles, tile = blockIdx.x % plan.tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / LANES;
  const int first = lane % LANES * kWidth;
  const int R = p.H / p.HK;
  const List list(p, b);
  const int64_t begin = static_cast<int64_t>(tile) * plan.keys;

  if (begin < list.count) {
    int token[kSlots], part[kSlots];
    Sums sums[kSlots];
#pragma unroll
    for (int u = 0; u < kSlots; ++u) {
      const int slot = warp * kSlots + u;
      token[u] = list[begin + slot / plan.parts * kGroups + group];
      part[u] = slot % plan.parts;
      sums[u] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    for (int step = 0; step < p.HK; step += plan.parts) {
      Slot<LANES, CHUNKS> slots[kSlots];
#pragma unroll
      for (int u = 0; u < kSlots; ++u) {
        const int64_t h = step + part[u], row = token[u];
        const float* k_row = static_cast<const float*>(p.k.data) + b * p.k.batch + h * p.k.head + row * p.k.row;
        const float* v_row = static_cast<const float*>(p.v.data) + b * p.v.batch + h * p.v.head + row * p.v.row;
        slots[u].load(k_row, v_row, first, p.D, row >= 0 && h < p.HK, plan.vectors);
      }
#pragma unroll
      for (int u = 0; u < kSlots; ++u) {
        const int h = step + part[u];
        const bool live = token[u] >= 0 && h < p.HK;
        for (int r = 0; r < R; ++r) {
          const int64_t head = static_cast<int64_t>(h) * R + r;
          const float lse = live ? lse_of(p, b, head) : 0.0f;
          slots[u].fold(p, head_of<float>(p.q, b, head), head_of<float>(p.o, b, head), lse, first, live, plan.vectors,
                        sums[u]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kSlots; ++u) {
#pragma unroll
      for (int step = LANES / 2; step > 0; step /= 2) {
        sums[u].left += __shfl_xor_sync(kAll, sums[u].left, step);
        sums[u].along += __shfl_xor_sync(kAll, sums[u].along, step);
        sums[u].own += __shfl_xor_sync(kAll, sums[u].own, step);
      }
      if (first == 0) shared[(warp * kSlots + u) * kGroups + group] = sums[u];
    }
    let_next_launch_begin();
    const float square = sum_over_warp(square_of_output<float>(p, b, plan.vectors));
    if (lane == 0) squares[warp] = square;
    __syncthreads();
  }

  const int64_t entry = begin + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= plan.keys || entry >= p.K) return;
  Scores scores{1.0f, 0.0f, 0.0f};
  if (list[entry] >= 0) {
    const int key = threadIdx.x / kGroups, column = threadIdx.x % kGroups;
    Sums total{0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < plan.parts; ++i) {
      const Sums& x = shared[(key * plan.parts + i) * kGroups + column];
      total.left += x.left;
      total.along += x.along;
      total.own += x.own;
      total.mass += x.mass;
    }
    float whole = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) whole += squares[w];
    scores = {cosine_of(total.left, total.along, whole), sqrtf(total.own), total.mass};
  }
  const int64_t place = static_cast<int64_t>(b) * p.K + entry;
  p.cosine[place] = scores.cosine;
  p.norm[place] = scores.norm;
  p.mass[place] = scores.mass;
}

}  // namespace sk::token_scores
