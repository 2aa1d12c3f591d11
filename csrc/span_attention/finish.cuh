// The end of a row: its sums joined over warps and splits, then o and lse.
#pragma once

#include "span_attention/params.h"
#include "span_attention/plan.h"
#include "span_attention/share.cuh"
#include "streamkernels/mma.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::span_attention {

// Where a row stands in tensors [B, H, T], and its o in [B, T, H, D].
struct Place {
  int64_t row, o;
};

__device__ __forceinline__ Place place_of(const Params& p, int b, int h, int t) {
  return {(static_cast<int64_t>(b) * p.H + h) * p.T + t, ((static_cast<int64_t>(b) * p.T + t) * p.H + h) * p.D};
}

// What the sums of a row are multiplied by: 1 / (sum + 2^(sink logit - top)), 0 for a row that saw nothing.
template <typename Element>
__device__ __forceinline__ float gain_of(const Params& p, const Part& part, int h) {
  if (part.sum == 0.0f) return 0.0f;
  float whole = part.sum;
  if (p.sink_logits != nullptr) {
    const float logit = p.sink_logits_fp32 ? static_cast<const float*>(p.sink_logits)[h]
                                           : to_float(static_cast<const Element*>(p.sink_logits)[h]);
    whole += exp2f(logit * kLog2E - finite_top(part.top));
  }
  return 1.0f / whole;
}

__device__ __forceinline__ float lse_of(const Part& part) {
  return part.sum == 0.0f ? -INFINITY : (finite_top(part.top) + log2f(part.sum)) * kLn2;
}

// What a part's sums count for in the whole whose largest score is `top`.
__device__ __forceinline__ float share_of(const Part& part, float top) {
  return part.sum == 0.0f ? 0.0f : exp2f(part.top - finite_top(top));
}

// Two neighbouring columns of a row, as sums: to o, or to the split's own sums.
template <typename Element>
__device__ __forceinline__ void put(const Params& p, const Plan& plan, int split, const Place& place, int column,
                                    float gain, float first, float second) {
  if (plan.splits > 1) {
    const int64_t rows = static_cast<int64_t>(p.B) * p.H * p.T;
    *reinterpret_cast<float2*>(p.partial + (split * rows + place.row) * p.D + column) = make_float2(first, second);
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.o) + place.o + column) =
        pack<Element>(first * gain, second * gain);
  }
}

// The row's part: to lse, or to the split's own.
__device__ __forceinline__ void put(const Params& p, const Plan& plan, int split, const Place& place,
                                    const Part& part) {
  if (plan.splits > 1) {
    const int64_t rows = static_cast<int64_t>(p.B) * p.H * p.T;
    *reinterpret_cast<float2*>(p.parts + (split * rows + place.row) * 2) = make_float2(part.top, part.sum);
  } else {
    p.lse[place.row] = lse_of(part);
  }
}

// Each warp has rows of its own.
template <typename Element, int D, typename Sums>
__device__ __forceinline__ void finish_own(const Params& p, const Plan& plan, const Tile& tile, int split, int row0,
                                           const Sums& sums) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + lane / 4 + 8 * i;
    if (row >= tile.rows) continue;
    const int h = tile.head(row);
    const Place place = place_of(p, tile.b, h, tile.row(row));
    const float gain = gain_of<Element>(p, sums.part[i], h);
    // a split that saw nothing is not read
    if (plan.splits == 1 || sums.part[i].sum != 0.0f) {
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        put<Element>(p, plan, split, place, 8 * d + column, gain, sums.acc[d][2 * i], sums.acc[d][2 * i + 1]);
      }
    }
    if (lane % 4 == 0) put(p, plan, split, place, sums.part[i]);
  }
}

// The warps have the same rows: their sums meet in shared memory, room for [kWarps, 16, D] floats.
template <typename Element, int D, typename Sums>
__device__ __forceinline__ void finish_shared(const Params& p, const Plan& plan, const Tile& tile, int split,
                                              const Sums& sums, float* room) {
  __shared__ Part parts[kWarps][16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (row >= tile.rows) continue;
    if (lane % 4 == 0) parts[warp][row] = sums.part[i];
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      *reinterpret_cast<float2*>(room + (warp * 16 + row) * D + 8 * d + column) =
          make_float2(sums.acc[d][2 * i], sums.acc[d][2 * i + 1]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile.rows * (D / 2); i += kThreads) {
    const int row = i / (D / 2), at = i % (D / 2) * 2, h = tile.head(row);
    Part whole{-INFINITY, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) whole.top = fmaxf(whole.top, parts[w][row].top);
    float first = 0.0f, second = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float share = share_of(parts[w][row], whole.top);
      const float2 x = *reinterpret_cast<const float2*>(room + (w * 16 + row) * D + at);
      whole.sum = fmaf(share, parts[w][row].sum, whole.sum);
      first = fmaf(share, x.x, first);
      second = fmaf(share, x.y, second);
    }
    const Place place = place_of(p, tile.b, h, tile.row(row));
    put<Element>(p, plan, split, place, at, gain_of<Element>(p, whole, h), first, second);
    if (at == 0) put(p, plan, split, place, whole);
  }
}

// The sums of splits first, first + step, ... of one row, four columns a lane from `column`.
__device__ __forceinline__ float4 sum_of_splits(const Params& p, const Plan& plan, int64_t rows, int64_t row,
                                                const float* shares, int first, int step, int column) {
  constexpr int kInFlight = 8;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = first; s < plan.splits; s += kInFlight * step) {
    float4 x[kInFlight];
    float share[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int split = s + u * step;
      share[u] = split < plan.splits ? shares[split] : 0.0f;
      x[u] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      // a split that saw nothing wrote nothing
      if (share[u] != 0.0f) x[u] = *reinterpret_cast<const float4*>(p.partial + (split * rows + row) * p.D + column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      sum.x = fmaf(share[u], x[u].x, sum.x);
      sum.y = fmaf(share[u], x[u].y, sum.y);
      sum.z = fmaf(share[u], x[u].z, sum.z);
      sum.w = fmaf(share[u], x[u].w, sum.w);
    }
  }
  return sum;
}

// Joins the splits of one row of q: four columns a lane, the splits dealt out to the warps. The order is fixed: the
// same bits every time.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    join_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  __shared__ float shares[kMaxSplits];
  __shared__ float4 sums[kWarps][kMaxDim / 4];
  const int64_t rows = static_cast<int64_t>(p.B) * p.H * p.T, row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_launch_before();
  // every warp finds the whole for itself
  constexpr int kPerLane = kMaxSplits / 32;
  Part own[kPerLane];
  Part whole{-INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int split = lane + 32 * i;
    float2 x = make_float2(-INFINITY, 0.0f);
    if (split < plan.splits) x = *reinterpret_cast<const float2*>(p.parts + (split * rows + row) * 2);
    own[i] = {x.x, x.y};
    whole.top = fmaxf(whole.top, own[i].top);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) whole.top = fmaxf(whole.top, __shfl_xor_sync(kAll, whole.top, step));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float share = share_of(own[i], whole.top);
    if (warp == 0) shares[lane + 32 * i] = share;
    whole.sum = fmaf(share, own[i].sum, whole.sum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) whole.sum += __shfl_xor_sync(kAll, whole.sum, step);
  __syncthreads();

  for (int column = 4 * lane; column < p.D; column += 128) {
    sums[warp][column / 4] = sum_of_splits(p, plan, rows, row, shares, warp, kWarps, column);
  }
  __syncthreads();
  const int t = row % p.T, h = row / p.T % p.H, b = row / p.T / p.H;
  const Place place = place_of(p, b, h, t);
  if (threadIdx.x == 0) p.lse[row] = lse_of(whole);
  const int column = 4 * threadIdx.x;
  if (column >= p.D) return;
  const float gain = gain_of<Element>(p, whole, h);
  float4 sum = sums[0][threadIdx.x];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    const float4 x = sums[w][threadIdx.x];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  uint2 bits;
  bits.x = pack<Element>(sum.x * gain, sum.y * gain);
  bits.y = pack<Element>(sum.z * gain, sum.w * gain);
  *reinterpret_cast<uint2*>(static_cast<Element*>(p.o) + place.o + column) = bits;
}

}  // namespace sk::span_attention
