// The end of a row: its sums joined over warps and splits, then o and lse.
#pragma once

#include "span_attention/params.h"
#include "span_attention/plan.h"
#include "span_attention/share.cuh"
#include "streamkernels/mma.cuh"

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

// Joins the splits of every row: one warp a row, four columns a lane. The order is fixed: the same bits every time.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    join_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  const int64_t rows = static_cast<int64_t>(p.B) * p.H * p.T;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const auto part_of = [&](int split) {
    const float2 x = split < plan.splits ? *reinterpret_cast<const float2*>(p.parts + (split * rows + row) * 2)
                                         : make_float2(-INFINITY, 0.0f);
    return Part{x.x, x.y};
  };
  constexpr int kPerLane = kMaxSplits / 32;
  Part own[kPerLane];
  Part whole{-INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    own[i] = part_of(lane + 32 * i);
    whole.top = fmaxf(whole.top, own[i].top);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) whole.top = fmaxf(whole.top, __shfl_xor_sync(kAll, whole.top, step));
  float share[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    share[i] = share_of(own[i], whole.top);
    whole.sum = fmaf(share[i], own[i].sum, whole.sum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) whole.sum += __shfl_xor_sync(kAll, whole.sum, step);

  const int t = row % p.T, h = row / p.T % p.H, b = row / p.T / p.H;
  const Place place = place_of(p, b, h, t);
  const float gain = gain_of<Element>(p, whole, h);
  if (lane == 0) p.lse[row] = lse_of(whole);
  // all lanes go round as often: they hand each other their shares
  for (int first = 0; first < p.D; first += 128) {
    const int column = first + 4 * lane;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
#pragma unroll 8
      for (int s = 0; s < min(32, plan.splits - 32 * i); ++s) {
        const float factor = __shfl_sync(kAll, share[i], s);
        if (factor == 0.0f || column >= p.D) continue;
        const float4 x = *reinterpret_cast<const float4*>(p.partial + ((s + 32 * i) * rows + row) * p.D + column);
        sum.x = fmaf(factor, x.x, sum.x);
        sum.y = fmaf(factor, x.y, sum.y);
        sum.z = fmaf(factor, x.z, sum.z);
        sum.w = fmaf(factor, x.w, sum.w);
      }
    }
    if (column >= p.D) continue;
    uint2 bits;
    bits.x = pack<Element>(sum.x * gain, sum.y * gain);
    bits.y = pack<Element>(sum.z * gain, sum.w * gain);
    *reinterpret_cast<uint2*>(static_cast<Element*>(p.o) + place.o + column) = bits;
  }
}

}  // namespace sk::span_attention
