// An item's result from the states of its warps, blocks and workers.
#pragma once

#include "incremental_prefill/attend.cuh"
#include "incremental_prefill/merge.cuh"
#include "incremental_prefill/walk.cuh"

namespace sk::incremental_prefill {

// The state of all warps into shared memory: o [kWarpsS][kRows][kOutRow] and (m, l) [kWarpsS][kRows].
template <class S>
__device__ __forceinline__ void park(State<S>& state, int valid, float* out, float2* statistics) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / S::kWarpsM, row = warp % S::kWarpsM * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.l[i] += __shfl_xor_sync(~0u, state.l[i], 1);
    state.l[i] += __shfl_xor_sync(~0u, state.l[i], 2);
    if (lane % 4 == 0) statistics[group * S::kRows + row + 8 * i] = make_float2(state.m[i], state.l[i]);
    if (row + 8 * i >= valid) continue;
    float* to = out + (group * S::kRows + row + 8 * i) * S::kOutRow + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::D / 8; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(state.o[n][2 * i], state.o[n][2 * i + 1]);
    }
  }
}

// Joins warps, blocks and workers; whoever is last writes o and lse.
template <class S>
__device__ __forceinline__ void merge(const Params& p, const Plan& plan, const Rows2& rows, const Job& job, bool idle,
                                      float* out, float2* statistics, int* flag) {
  const int log = cluster_log(), C = 1 << log, rank = blockIdx.x & (C - 1), worker = job.worker;
  const Target& at = job.at;
  const int valid = job.valid;
  // whose share ends before the first tile leaves the item to the next one
  const int first_worker = divide(job.begin + plan.begin, job.share);
  const int workers = divide(job.begin + job.steps - 1, job.share) - first_worker + 1;
  const bool alone = workers == 1;
  const auto partial_of = [&](int n) { return Partial<S>(p.partials, n, n * job.share >= job.begin); };
  uint32_t* counter = p.counters + (int64_t{at.b} * p.HK * plan.tiles_m + job.item) * C + rank;
  if (S::kEager && !alone) {
    // where these lie is looked up while the block joins its own
    if (static_cast<int>(threadIdx.x) < workers) prefetch(partial_of(first_worker + threadIdx.x).o);
    if (threadIdx.x == S::kThreads - 1) prefetch(counter);
  }
  const auto is_padding = [&](int row) { return rows.sights[divide_by_R(plan, at.first_row + row)].y < 0; };
  constexpr int kFours = S::D / 4;
  float2* joined = statistics + S::kWarpsS * S::kRows;
  const auto warps = [&](int row, int column) {
    Part part = nothing();
    Sources<S::kWarpsS> from;
    from.read(
        S::kWarpsS, [&](int i) { return statistics[i * S::kRows + row]; },
        [&](int i) { return *reinterpret_cast<float4*>(out + (i * S::kRows + row) * S::kOutRow + column); });
    from.fold(part);
    return part;
  };
  Range mine{0, valid * kFours};
  if (C > 1) {
    if (idle) {
      for (int row = threadIdx.x; row < valid; row += S::kThreads) joined[row] = make_float2(-INFINITY, 0.f);
    } else {
      for (int i = threadIdx.x; i < valid * kFours; i += S::kThreads) {
        const int row = i / kFours, column = i % kFours * 4;
        const Part part = warps(row, column);
        *reinterpret_cast<float4*>(out + row * S::kOutRow + column) = part.o;
        if (column == 0) joined[row] = make_float2(part.m, part.l);
      }
    }
    mine = part_of(mine, rank, log);
    cluster_barrier();
  }
  // as many as there are registers for
  constexpr int kBlocks = S::kEager || S::D <= 128 ? 8 : 4;
  const uint32_t out_address = shared_address(out), joined_address = shared_address(joined);
  for (int i = mine.begin + static_cast<int>(threadIdx.x); i < mine.end; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    Part part = nothing();
    if (C == 1) {
      part = warps(row, column);
    } else {
      const uint32_t values = out_address + (row * S::kOutRow + column) * 4;
#pragma unroll
      for (int first = 0; first < 8; first += kBlocks) {
        Sources<kBlocks> from;
        from.read(
            C - first, [&](int r) { return load_remote2(remote(joined_address + row * 8, first + r)); },
            [&](int r) { return load_remote4(remote(values, first + r)); });
        // of a block that had nothing to do
        from.drop_unwritten();
        from.fold(part);
      }
    }
    if (alone) {
      finish<S>(p, plan, at, is_padding(row), row, column, part);
    } else {
      partial_of(worker).put(row, column, part);
    }
  }
  // others may still read this block's shared memory
  if (C > 1) cluster_barrier_after_reads();
  if (alone) return;
  if (!arrive_last(counter, workers, flag)) return;
  // memory answers late: a thread asks for all that it joins before it waits for anything
  constexpr int kWorkers = S::kEager || S::D <= 128 ? 4 : 2;
  constexpr int kAtOnce = S::kEager && S::D <= 128 ? least(2, ceil_div(S::kRows * kFours, S::kThreads)) : 1;
#pragma unroll 1
  for (int base = mine.begin + static_cast<int>(threadIdx.x); base < mine.end; base += kAtOnce * S::kThreads) {
    Part part[2] = {nothing(), nothing()};
#pragma unroll 1
    for (int first = 0; first < workers; first += kWorkers) {
      Sources<kWorkers> from[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = base + n * S::kThreads, row = i / kFours, column = i % kFours * 4;
        from[n].read(
            i < mine.end ? workers - first : 0,
            [&](int k) { return partial_of(first_worker + first + k).statistics(row); },
            [&](int k) { return partial_of(first_worker + first + k).values(row, column); });
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) from[n].fold(part[n]);
    }
#pragma unroll 1
    for (int i = base, n = 0; n < kAtOnce && i < mine.end; ++n, i += S::kThreads) {
      finish<S>(p, plan, at, is_padding(i / kFours), i / kFours, i % kFours * 4, part[0]);
      part[0] = part[1];
    }
  }
}

}  // namespace sk::incremental_prefill
