// The result of a plain session's item: every block of a cluster sends the others (m, l) of the rows that they join, so
// that they know what its part weighs, then the rows, by the copy engine, and joins its own; clusters are joined by the
// blocks that arrive last, a share of the rows each.
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

// Warpgroups that share out the keys join what they have: each keeps its part of the columns, the GROUP-th, and hands
// the others over. What blocks send is what joining them takes, and is as many times less so. Warps without a valid row
// have nothing to hand over.
template <class S, int GROUP>
__device__ __forceinline__ void join_groups(State<S>& state, const Rank& rank, char* exchange) {
  constexpr int kFirst = S::first_column(GROUP), kLast = S::first_column(GROUP + 1), kOthers = S::kKeyGroups - 1;
  float4* const places = reinterpret_cast<float4*>(exchange) + threadIdx.x % 128;
  const auto place = [&](int group, int n) -> float4& { return places[(group * S::kPlaces + n) * 128]; };
  const bool valid = static_cast<int>(threadIdx.x) % 128 / 32 * 16 < rank.valid;
  if (valid) {
#pragma unroll
    for (int n = 0; n < S::kColumns; ++n) {
      const auto& x = state.o[n];
      if (n < kFirst || n >= kLast) {
        place(GROUP, n < kFirst ? n : n - (kLast - kFirst)) = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
    place(GROUP, S::kPlaces - 1) = make_float4(state.m[0], state.m[1], state.l[0], state.l[1]);
  }
  meet<kReadersMeet, S::kReaders>();
  if (!valid) return;
  float weight[kOthers + 1][2];  // of the others, then of what this one has
  float m[kOthers][2], l[kOthers][2], top[2] = {state.m[0], state.m[1]};
#pragma unroll
  for (int k = 0; k < kOthers; ++k) {
    const float4 ml = place(k < GROUP ? k : k + 1, S::kPlaces - 1);
    m[k][0] = ml.x, m[k][1] = ml.y, l[k][0] = ml.z, l[k][1] = ml.w;
    top[0] = fmaxf(top[0], ml.x), top[1] = fmaxf(top[1], ml.y);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float shift = top[i] == -INFINITY ? 0.f : top[i];
    weight[kOthers][i] = exp2_fast(state.m[i] - shift);
    state.m[i] = top[i];
    state.l[i] *= weight[kOthers][i];
#pragma unroll
    for (int k = 0; k < kOthers; ++k) {
      weight[k][i] = exp2_fast(m[k][i] - shift);
      state.l[i] += l[k][i] * weight[k][i];
    }
  }
#pragma unroll
  for (int n = kFirst; n < kLast; ++n) {
    auto& x = state.o[n];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] *= weight[kOthers][j / 2];
#pragma unroll
    for (int k = 0; k < kOthers; ++k) {
      const int group = k < GROUP ? k : k + 1;
      // the other one has left out its own columns
      const float4 y = place(group, group < GROUP ? n - (S::first_column(group + 1) - S::first_column(group)) : n);
      x[0] += y.x * weight[k][0], x[1] += y.y * weight[k][0];
      x[2] += y.z * weight[k][1], x[3] += y.w * weight[k][1];
    }
  }
}

// (m, l) of a reader's rows to the blocks that join them; every thread of those that do this arrives in its own block.
template <class S>
__device__ __forceinline__ void send_statistics(State<S>& state, const Rank& rank, char* statistics, uint32_t known) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
  if (warp >= 4 * S::kRowGroups) return;
  float by = reciprocal(rank.own_rows);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.l[i] += __shfl_xor_sync(~0u, state.l[i], 1);
    state.l[i] += __shfl_xor_sync(~0u, state.l[i], 2);
  }
  // a lane for each row
  const int r = row + lane % 4 * 8;
  if (lane % 4 < 2 && r < rank.valid) {
    const float m = lane % 4 ? state.m[1] : state.m[0], l = lane % 4 ? state.l[1] : state.l[0];
    const int to = divide(r, rank.own_rows, by), place = (rank.block * rank.own_rows + r - to * rank.own_rows) * 8;
    if (to == rank.block) {
      *reinterpret_cast<float2*>(statistics + place) = make_float2(m, l);
    } else {
      push(remote(shared_address(statistics) + place, to), m, l, remote(known, to));
    }
  }
  barrier_arrive(known);
}

// A reader's state into the block's shared memory, rows of kRow bytes; where warpgroups share out the keys, the columns
// that it kept.
template <class S, int GROUP>
__device__ __forceinline__ void park(const State<S>& state, const Rank& rank, char* parked) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % (4 * S::kRowGroups) * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + 8 * i >= rank.valid) continue;
    float* to = reinterpret_cast<float*>(parked + (row + 8 * i) * S::kRow);
#pragma unroll
    for (int n = S::first_column(GROUP); n < S::first_column(GROUP + 1); ++n) {
      *reinterpret_cast<float2*>(to + 8 * n + lane % 4 * 2) = make_float2(state.o[n][2 * i], state.o[n][2 * i + 1]);
    }
  }
}

// What the GROUP-th of the warpgroups that share out the keys does when it has attended: its part of the block's rows
// is parked, and their (m, l) are sent.
template <class S, int GROUP>
__device__ __forceinline__ void leave(State<S>& state, const Rank& rank, char* exchange, char* parked, char* statistics,
                                      uint32_t known) {
  if constexpr (GROUP + 1 < S::kKeyGroups) {
    if (threadIdx.x / (128 * S::kRowGroups) != GROUP) {
      return leave<S, GROUP + 1>(state, rank, exchange, parked, statistics, known);
    }
  }
  if constexpr (S::kKeyGroups > 1) join_groups<S, GROUP>(state, rank, exchange);
  if constexpr (GROUP == 0) send_statistics<S>(state, rank, statistics, known);
  park<S, GROUP>(state, rank, parked);
}

// What loaders do when all rows are parked: rows to the blocks that join them, the next one first. A warp begins one
// copy at a time, so all warps do.
template <class S>
struct Sending {
  uint32_t to = 0, from = 0, bytes = 0, barrier = 0;

  // lane n of warp w sends to block 1 + w + 4 n from here
  __device__ __forceinline__ Sending(const Rank& rank, const char* parked, char* inbox, uint32_t received) {
    const int n = 1 + threadIdx.x % 128 / 32 + threadIdx.x % 32 * 4;
    if (n >= rank.blocks) return;
    const int block = rank.block + n < rank.blocks ? rank.block + n : rank.block + n - rank.blocks;
    const int first = block * rank.own_rows, rows = least(rank.own_rows, rank.valid - first);
    if (rows <= 0) return;
    to = remote(shared_address(inbox) + rank.block * rank.own_rows * S::kRow, block);
    from = shared_address(parked) + first * S::kRow;
    bytes = rows * S::kRow;
    barrier = remote(received, block);
    asm volatile("" : "+r"(to), "+r"(from), "+r"(bytes), "+r"(barrier));
  }
  __device__ __forceinline__ void begin() const {
    if (bytes != 0) push(to, from, bytes, barrier);
  }
};

// And what readers do: rows that this block joins itself to their place.
template <class S>
__device__ __forceinline__ void keep(const Rank& rank, const char* parked, char* inbox) {
  const int place = rank.block * rank.own_rows * S::kRow;
  const auto* from = reinterpret_cast<const uint4*>(parked + place);
  auto* to = reinterpret_cast<uint4*>(inbox + place);
  for (int i = threadIdx.x; i < rank.mine * (S::kRow / 16); i += S::kReaders) to[i] = from[i];
}

// By loaders: what the parts of this block's rows weigh, and the rows' lse; or, where other clusters have parts of them
// too, their (m, l).
template <class S>
struct Weighing {
  using Element = typename S::Element;

  const Params& p;
  const Plan& plan;
  const Rank& rank;
  int part, parts;
  const float2* statistics;
  float* weights;

  // What the weights of a row of this block's are multiplied by.
  __device__ __forceinline__ float finish(int row, float m, float l, bool writes) const {
    const int first = rank.block * rank.own_rows;
    if (parts > 1) {
      if (writes) {
        Partial<S>(p.partials, part * p.HK * plan.tiles_m + rank.item).put_statistics(first + row, m, l);
      }
      return 1.f;
    }
    const RowPlace to(p, plan, rank.at, first + row);
    float lse;
    const float gate = gate_of<Element>(p, to.h, m, l, lse);
    if (writes) p.lse[to.lse] = lse;
    return gate;
  }
  // A thread for a row.
  __device__ __forceinline__ void few() const {
    const int row = threadIdx.x % 128;
    if (row >= rank.mine) return;
    float m = -INFINITY, l = 0.f;
#pragma unroll 2
    for (int k = 0; k < rank.blocks; ++k) m = fmaxf(m, statistics[k * rank.own_rows + row].x);
    const float shift = m == -INFINITY ? 0.f : m;
    float* const to = weights + row * rank.blocks;
#pragma unroll 2
    for (int k = 0; k < rank.blocks; ++k) {
      const float2 ml = statistics[k * rank.own_rows + row];
      const float weight = exp2_fast(ml.x - shift);
      l += weight * ml.y;
      to[k] = weight;
    }
    const float gate = finish(row, m, l, true);
    if (parts > 1) return;
#pragma unroll 2
    for (int k = 0; k < rank.blocks; ++k) to[k] *= gate;
  }
  // 16 lanes for a row, a part each.
  __device__ __forceinline__ void many() const {
    const int lane = threadIdx.x % 16;
#pragma unroll 1
    for (int row = threadIdx.x % 128 / 16; row - row % 2 < rank.mine; row += 8) {
      const bool is = lane < rank.blocks && row < rank.mine;
      const float2 ml = is ? statistics[lane * rank.own_rows + row] : make_float2(-INFINITY, 0.f);
      float m = ml.x;
#pragma unroll
      for (int n = 8; n > 0; n /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, n));
      float weight = exp2_fast(ml.x - (m == -INFINITY ? 0.f : m)), l = weight * ml.y;
#pragma unroll
      for (int n = 8; n > 0; n /= 2) l += __shfl_xor_sync(~0u, l, n);
      weight *= finish(least(row, most(0, rank.mine - 1)), m, l, is && lane == 0);
      if (is) weights[row * rank.blocks + lane] = weight;
    }
  }
};

template <class S>
__device__ __forceinline__ void weigh_parts(const Params& p, const Plan& plan, const Rank& rank, int part, int parts,
                                            const float2* statistics, float* weights) {
  const Weighing<S> weighing{p, plan, rank, part, parts, statistics, weights};
  rank.blocks <= 8 ? weighing.few() : weighing.many();
}

// Four columns of a row from any number of parts of it, AT_ONCE of which are read before one is used.
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

// Joins what the cluster's blocks sent, once it is there, and, where `parts` clusters share an item, this block's share
// of what they wrote down.
template <class S>
__device__ __forceinline__ void join(const Params& p, const Plan& plan, const Rank& rank, int part, int parts,
                                     const char* inbox, const float* weights, uint32_t received, uint32_t* flag) {
  using Element = typename S::Element;
  constexpr int kFours = S::D / 4;
  const int items = p.HK * plan.tiles_m, first = rank.block * rank.own_rows;
  const int stride = rank.own_rows * S::kRow;  // bytes from one source to the next
  // where a row goes is known before it is there
  const auto place_of = [&](int i) {
    return static_cast<uint2*>(p.o) + RowPlace(p, plan, rank.at, first + i / kFours).o * kFours + i % kFours;
  };
  int i = threadIdx.x;
  uint2* o = place_of(i);
  asm volatile("" : "+l"(o));
  barrier_wait(received, 0);
  // this block has what was sent to it: the others may leave
  cluster_arrive();
  __syncthreads();
#pragma unroll 1
  for (; i < rank.mine * kFours; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    const char* from = inbox + row * S::kRow + column * 4;
    const float* weight = weights + row * rank.blocks;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll(S::kRowGroups > 1 ? 2 : 4)
    for (int k = 0; k < rank.blocks; ++k, from += stride) {
      const float w = weight[k];
      const float4 x = *reinterpret_cast<const float4*>(from);
      sum.x += w * x.x, sum.y += w * x.y, sum.z += w * x.z, sum.w += w * x.w;
    }
    if (parts == 1) {
      if (i >= S::kThreads) o = place_of(i);
      *o = {pack<Element>(sum.x, sum.y), pack<Element>(sum.z, sum.w)};
    } else {
      Partial<S>(p.partials, part * items + rank.item).put_values(first + row, column, sum);
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
