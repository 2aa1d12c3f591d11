// The result of a plain session's item: every block of a cluster sends the others the rows that they join, by the copy
// engine, and joins its own; clusters are joined by the blocks that arrive last, a share of the rows each.
#pragma once

#include "incremental_prefill/merge.cuh"
#include "incremental_prefill/plain/barrier.cuh"
#include "incremental_prefill/plain/config.h"
#include "incremental_prefill/plain/shape.cuh"
#include "incremental_prefill/plain/shares.cuh"

namespace sk::incremental_prefill {

// Whose item it is, and how its rows are shared out: block r of the cluster joins rows [r * own_rows, + own_rows).
struct Rank {
  Target at;
  int valid, item;    // rows of the tile; of all items
  int block, blocks;  // of the cluster
  int own_rows, mine;
};

// Two warpgroups that share out the keys join what they have: each keeps half of the columns, the GROUP-th, and hands
// the other half over. What blocks send is what joining them takes, and is half as much so. Warps without a valid row
// have nothing to hand over.
template <class S, int GROUP>
__device__ __forceinline__ void join_half(State<S>& state, const Rank& rank, char* exchange) {
  constexpr int kHalf = S::D / 16, kPlaces = kHalf + 1;  // of 16 bytes, for each thread
  float4* const places = reinterpret_cast<float4*>(exchange) + threadIdx.x % 128;
  float4 *const own = places + GROUP * kPlaces * 128, *const others = places + (1 - GROUP) * kPlaces * 128;
  const bool valid = static_cast<int>(threadIdx.x) % 128 / 32 * 16 < rank.valid;
  if (valid) {
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      const auto& x = state.o[(1 - GROUP) * kHalf + n];
      own[n * 128] = make_float4(x[0], x[1], x[2], x[3]);
    }
    own[kHalf * 128] = make_float4(state.m[0], state.m[1], state.l[0], state.l[1]);
  }
  meet<kReadersMeet, S::kReaders>();
  if (!valid) return;
  const float4 ml = others[kHalf * 128];
  const float m[2] = {ml.x, ml.y}, l[2] = {ml.z, ml.w};
  float before[2], weight[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float top = fmaxf(state.m[i], m[i]), shift = top == -INFINITY ? 0.f : top;
    before[i] = exp2_fast(state.m[i] - shift), weight[i] = exp2_fast(m[i] - shift);
    state.m[i] = top;
    state.l[i] = state.l[i] * before[i] + l[i] * weight[i];
  }
#pragma unroll
  for (int n = 0; n < kHalf; ++n) {
    const float4 y = others[n * 128];
    auto& x = state.o[GROUP * kHalf + n];
    x[0] = x[0] * before[0] + y.x * weight[0], x[1] = x[1] * before[0] + y.y * weight[0];
    x[2] = x[2] * before[1] + y.z * weight[1], x[3] = x[3] * before[1] + y.w * weight[1];
  }
}
template <class S>
__device__ __forceinline__ void join_groups(State<S>& state, const Rank& rank, char* exchange) {
  if (threadIdx.x < 128) {
    join_half<S, 0>(state, rank, exchange);
  } else {
    join_half<S, 1>(state, rank, exchange);
  }
}

// A reader's state into the block's shared memory, rows of kRow bytes; where warpgroups share out the keys, the columns
// that it kept.
template <class S>
__device__ __forceinline__ void park(State<S>& state, const Rank& rank, char* parked) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / (4 * S::kRowGroups), row = warp % (4 * S::kRowGroups) * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.l[i] += __shfl_xor_sync(~0u, state.l[i], 1);
    state.l[i] += __shfl_xor_sync(~0u, state.l[i], 2);
    if (row + 8 * i >= rank.valid) continue;
    float* to = reinterpret_cast<float*>(parked + (row + 8 * i) * S::kRow);
    if (group == 0 && lane % 4 == 0) *reinterpret_cast<float2*>(to + S::D) = make_float2(state.m[i], state.l[i]);
#pragma unroll
    for (int n = 0; n < S::D / 8; ++n) {
      if (S::kKeyGroups > 1 && n / (S::D / 16) != group) continue;
      *reinterpret_cast<float2*>(to + 8 * n + lane % 4 * 2) = make_float2(state.o[n][2 * i], state.o[n][2 * i + 1]);
    }
  }
}

// Called by all readers: what is parked to the blocks that join it, the next one first, and to its place for what this
// block joins. A warp begins one copy at a time, so all warps do.
template <class S>
__device__ __forceinline__ void send(const Rank& rank, const char* parked, char* inbox, uint32_t received) {
  const int place = rank.block * rank.own_rows * S::kRow;
  if (threadIdx.x % 32 == 0) {
#pragma unroll 1
    for (int n = 1 + threadIdx.x / 32; n < rank.blocks; n += S::kReaders / 32) {
      const int to = rank.block + n < rank.blocks ? rank.block + n : rank.block + n - rank.blocks;
      const int first = to * rank.own_rows, rows = least(rank.own_rows, rank.valid - first);
      if (rows <= 0) continue;
      push(remote(shared_address(inbox) + place, to), shared_address(parked) + first * S::kRow, rows * S::kRow,
           remote(received, to));
    }
  }
  const auto* from = reinterpret_cast<const uint4*>(parked + place);
  auto* to = reinterpret_cast<uint4*>(inbox + place);
  for (int i = threadIdx.x; i < rank.mine * (S::kRow / 16); i += S::kReaders) to[i] = from[i];
}

// Four columns of one row from `sources` parts of it, 16 at most; the TEAM lanes of a team, 16 or 32, have one row.
// Each lane weighs a part, all add up what they say. `statistics(i)` -> (m, l) of part i, `values(i)` -> its o.
template <int TEAM, typename Statistics, typename Values>
__device__ __forceinline__ Part join_as_team(int sources, Statistics statistics, Values values) {
  const int lane = threadIdx.x % kPlainCluster;
  const uint32_t team = TEAM == 32 ? ~0u : 0xffffu << threadIdx.x % 32 / TEAM * TEAM;
  const float2 ml = lane < sources ? statistics(lane) : make_float2(-INFINITY, 0.f);
  Part part{ml.x, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll
  for (int n = kPlainCluster / 2; n > 0; n /= 2) part.m = fmaxf(part.m, __shfl_xor_sync(team, part.m, n));
  const float weight = exp2_fast(ml.x - (part.m == -INFINITY ? 0.f : part.m));
  part.l = weight * ml.y;
#pragma unroll
  for (int n = kPlainCluster / 2; n > 0; n /= 2) part.l += __shfl_xor_sync(team, part.l, n);
#pragma unroll 4
  for (int i = 0; i < sources; ++i) {
    const float w = __shfl_sync(team, weight, i, TEAM);
    const float4 o = values(i);
    part.o.x += w * o.x, part.o.y += w * o.y, part.o.z += w * o.z, part.o.w += w * o.w;
  }
  return part;
}

// The same by one lane, for any number of sources, AT_ONCE of which are read before one is used.
template <int AT_ONCE, typename Statistics, typename Values>
__device__ __forceinline__ Part join_alone(int sources, Statistics statistics, Values values) {
  Part part = nothing();
#pragma unroll 1
  for (int base = 0; base < sources; base += AT_ONCE) {
    Sources<AT_ONCE> some;
    some.read(sources - base, [&](int i) { return statistics(base + i); }, [&](int i) { return values(base + i); });
    some.fold(part);
  }
  return part;
}

// Joins what the cluster's blocks sent and, where `parts` clusters share an item, its share of what they wrote down.
template <class S>
__device__ __forceinline__ void join(const Params& p, const Plan& plan, const Rank& rank, int part, int parts,
                                     const char* inbox, uint32_t* flag) {
  constexpr int kFours = S::D / 4;
  const int items = p.HK * plan.tiles_m, first = rank.block * rank.own_rows;
  const int stride = rank.own_rows * S::kRow;  // bytes from one source to the next
#pragma unroll 1
  for (int i = threadIdx.x; i < rank.mine * kFours; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    const auto from = [&](int k) { return reinterpret_cast<const float*>(inbox + row * S::kRow + k * stride); };
    const auto statistics = [&](int k) { return *reinterpret_cast<const float2*>(from(k) + S::D); };
    const auto values = [&](int k) { return *reinterpret_cast<const float4*>(from(k) + column); };
    Part whole;
    if constexpr (S::kRowGroups == 1) {
      whole = join_as_team<least(32, kFours)>(rank.blocks, statistics, values);
    } else {
      // blocks of many rows are few to a cluster
      whole = join_alone<2>(rank.blocks, statistics, values);
    }
    if (parts == 1) {
      finish<S>(p, plan, rank.at, false, first + row, column, whole);
    } else {
      Partial<S>(p.partials, part * items + rank.item).put(first + row, column, whole);
    }
  }
  if (parts == 1) return;
  uint32_t* counter = p.counters + rank.item * kPlainCluster + rank.block;
  const int shares = shares_of(rank.mine, parts), rows = divide(rank.mine + shares - 1, shares);
  uint32_t own = shares_of_block(counter, parts, shares, plan.patience, flag);
#pragma unroll 1
  for (; own != 0; own &= own - 1) {
    const int begin = (__ffs(static_cast<int>(own)) - 1) * rows, end = least(rank.mine, begin + rows);
#pragma unroll 1
    for (int i = begin * kFours + threadIdx.x; i < end * kFours; i += S::kThreads) {
      const int row = first + i / kFours, column = i % kFours * 4;
      const auto from = [&](int k) { return Partial<S>(p.partials, k * items + rank.item); };
      const Part whole = join_alone<8>(
          parts, [&](int k) { return from(k).statistics(row); }, [&](int k) { return from(k).values(row, column); });
      finish<S>(p, plan, rank.at, false, row, column, whole);
    }
  }
}

}  // namespace sk::incremental_prefill
