// Joining partial results (m, l, o): o = sum 2^(m_i - m) o_i, l = sum 2^(m_i - m) l_i with m = max m_i. First the warps
// of a block, then the blocks of a cluster, which reduce a slice of the rows each, then clusters, by counters: of the
// blocks that hold one slice the last to arrive joins it, always in the same order. Nobody ever depends on a block
// that may not be running.
#pragma once

#include <cstdint>

#include "incremental_prefill/cluster.cuh"
#include "incremental_prefill/instance.h"
#include "incremental_prefill/params.h"
#include "incremental_prefill/rows.cuh"
#include "streamkernels/mma.cuh"

namespace sk::incremental_prefill {

// Four columns of one row.
struct Part {
  float m, l;
  float4 o;
};

// Up to MOST partial results of the same four columns. All reads are under way before the first one is used.
template <int MOST>
struct Sources {
  float2 ml[MOST];
  float4 o[MOST];

  // `statistics(i)` -> (m, l) of source i, `values(i)` -> its o, for the first n of them
  template <typename Statistics, typename Values>
  __device__ __forceinline__ void read(int n, Statistics statistics, Values values) {
#pragma unroll
    for (int i = 0; i < MOST; ++i) ml[i] = i < n ? statistics(i) : make_float2(-INFINITY, 0.f);
#pragma unroll
    for (int i = 0; i < MOST; ++i) o[i] = i < n ? values(i) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
  // o of a source that saw nothing may be anything.
  __device__ __forceinline__ void drop_unwritten() {
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      if (ml[i].y == 0.f) o[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  __device__ __forceinline__ void fold(Part& part) const {
    float m = part.m;
#pragma unroll
    for (int i = 0; i < MOST; ++i) m = fmaxf(m, ml[i].x);
    const float shift = m == -INFINITY ? 0.f : m, before = exp2_fast(part.m - shift);
    part.m = m;
    part.l *= before;
    part.o.x *= before, part.o.y *= before, part.o.z *= before, part.o.w *= before;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const float weight = exp2_fast(ml[i].x - shift);
      part.l += weight * ml[i].y;
      part.o.x += weight * o[i].x, part.o.y += weight * o[i].y;
      part.o.z += weight * o[i].z, part.o.w += weight * o[i].w;
    }
  }
};
__device__ __forceinline__ Part nothing() {
  return {-INFINITY, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
}

// Where the rows of one tile go.
struct Target {
  int b, hk, first_row;
};

// Where a row of a tile goes.
struct RowPlace {
  int h;
  int64_t o, lse;  // rows of o and numbers of lse before it

  __device__ __forceinline__ RowPlace(const Params& p, const Plan& plan, const Target& to, int row) {
    const int at = to.first_row + row, t = divide_by_R(plan, at);
    h = to.hk * plan.R + at - t * plan.R;
    o = (int64_t{to.b} * p.T + t) * p.H + h;
    lse = (int64_t{to.b} * p.H + h) * p.T + t;
  }
};

// What o of a row of head h is multiplied by, and its lse.
template <typename Element>
__device__ __forceinline__ float gate_of(const Params& p, int h, float m, float l, float& lse) {
  lse = l == 0.f ? -INFINITY : (m + log2_fast(l)) * 0.6931471805599453f;
  float gate = l == 0.f ? 0.f : __fdividef(1.f, l);
  if (p.sink_logits != nullptr && l != 0.f) {
    const float logit = p.sink_logits_fp32 ? static_cast<const float*>(p.sink_logits)[h]
                                           : to_float(static_cast<const Element*>(p.sink_logits)[h]);
    gate = __fdividef(gate, 1.f + __expf(logit - lse));
  }
  return gate;
}

template <class S>
__device__ __forceinline__ void finish(const Params& p, const Plan& plan, const Target& to, bool padding, int row,
                                       int column, Part part) {
  using Element = typename S::Element;
  const RowPlace place(p, plan, to, row);
  if (padding) part = nothing();
  float lse;
  const float gate = gate_of<Element>(p, place.h, part.m, part.l, lse);
  const uint2 packed = {pack<Element>(part.o.x * gate, part.o.y * gate),
                        pack<Element>(part.o.z * gate, part.o.w * gate)};
  *reinterpret_cast<uint2*>(static_cast<Element*>(p.o) + place.o * S::D + column) = packed;
  if (column == 0) p.lse[place.lse] = lse;
}

// The two partial results that a worker may leave for others: of the item it begins in, and of the item it ends in.
template <class S>
struct Partial {
  float* o;  // [kRows, D], then (m, l) [kRows, 2]

  static constexpr int64_t kFloats = int64_t{S::kRows} * (S::D + 2);

  __device__ __forceinline__ Partial(float* all, int place) : o(all + int64_t{place} * kFloats) {}
  __device__ __forceinline__ Partial(float* all, int worker, bool begins_inside)
      : Partial(all, 2 * worker + (begins_inside ? 0 : 1)) {}
  __device__ __forceinline__ void put(int row, int column, const Part& part) const {
    put_values(row, column, part.o);
    if (column == 0) put_statistics(row, part.m, part.l);
  }
  __device__ __forceinline__ void put_values(int row, int column, float4 values) const {
    __stcg(reinterpret_cast<float4*>(o + row * S::D + column), values);
  }
  __device__ __forceinline__ void put_statistics(int row, float m, float l) const {
    __stcg(reinterpret_cast<float2*>(o + S::kRows * S::D + 2 * row), make_float2(m, l));
  }
  __device__ __forceinline__ float2 statistics(int row) const {
    return __ldcg(reinterpret_cast<const float2*>(o + S::kRows * S::D + 2 * row));
  }
  __device__ __forceinline__ float4 values(int row, int column) const {
    return __ldcg(reinterpret_cast<const float4*>(o + row * S::D + column));
  }
};

__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from) : "memory");
}

// Counts the block in, by one thread behind a barrier: releases what the barrier has gathered, acquires what the others
// released. Returns what the counter was.
__device__ __forceinline__ uint32_t count_in(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;\n" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
__device__ __forceinline__ uint32_t look_at(const uint32_t* counter) {
  uint32_t now;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(now) : "l"(counter) : "memory");
  return now;
}

// Counts the block in, behind what it wrote; true in the last of `n`, which then sees what all wrote. Leaves the
// counter at zero for the next launch.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t n, int* shared_flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = count_in(counter);
    if (before == n - 1) *counter = 0;
    *shared_flag = before == n - 1;
  }
  __syncthreads();
  return *shared_flag != 0;
}

}  // namespace sk::incremental_prefill
