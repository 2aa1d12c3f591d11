// incremental_prefill: one launch that rotates the new rows, writes them, and attends over source, target and
// themselves.
//
// The query rows of a key head lie side by side (row t * R + r), in tiles of kRows: an item is (session, key head, row
// tile). The steps (key tiles) of all items form one list, counted on the device from device lengths; every worker (a
// cluster of blocks) takes an equal share of it, and the blocks of a cluster an equal part of each item in the share.
// Only keys before the committed length are read from the cache, and only rows behind it are written: blocks need not
// wait for each other. New keys are rotated by the block that attends to them.
#pragma once

#include "incremental_prefill/attend.cuh"
#include "incremental_prefill/fresh.cuh"
#include "incremental_prefill/instance.h"
#include "incremental_prefill/merge.cuh"
#include "incremental_prefill/walk.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::incremental_prefill {

// Shared memory before the query tile, in bytes.
template <class S>
struct Header {
  static constexpr int kScratch = 256;
  static constexpr int kStatistics = (S::kWarpsS + 1) * S::kRows * 8;

  static constexpr int kSession = 256;
  static constexpr int kItems = S::kThreads / 32 * 160;

  static SK_HOST_DEVICE int sights() { return kScratch + kSession + kItems + kStatistics; }
  static SK_HOST_DEVICE int code(int T) { return sights() + 16 * T; }
  static SK_HOST_DEVICE int prefix(int T) { return code(T) + 4 * T; }
  static SK_HOST_DEVICE int bytes(int T, int B) { return (prefix(T) + 4 * (B > 1 ? B + 1 : 0) + 1023) / 1024 * 1024; }
};

// The item's share of this block: its new tiles, then its old tiles.
template <class S>
__device__ __forceinline__ void attend(const Params& p, const Plan& plan, const Rows2& rows, const Session& session,
                                       const Job& job, Item* items, State<S>& state, char* query_tile, char* stages) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % S::kWarpsM, first = warp / S::kWarpsM * S::kWarpKeys;
  const int depth = plan.stages;
  Range fresh = job.fresh;
  const uint32_t ring = shared_address(stages);
  // every warp has its own copy
  Item& item = items[warp];
  Run* runs = item.runs;
  const Hull& hull = item.hull;
  {
    const Hull found =
        hull_of(rows, divide_by_R(plan, job.at.first_row), divide_by_R(plan, job.at.first_row + job.valid - 1));
    if (lane == 4) item.hull = found;
    if (lane < 4) runs[lane] = run_of<S>(p, session, found, job.old, lane);
    __syncwarp();
  }
  int to_load = runs[0].tiles + runs[1].tiles + runs[2].tiles + runs[3].tiles, to_do = to_load;
  Loader<S> loader(runs);
  Cursor cursor{runs};
  int segment = 0, free_low = 0, free_high = 0;
  int t[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    t[i] = least(divide_by_R(plan, job.at.first_row + warp_m * 16 + lane / 4 + 8 * i), p.T - 1);
  }
  Fragments<S> fragments(shared_address(query_tile), warp_m * 16, first);
  int stage = 0, next = 0;  // of the tile that is attended to, of the one that is loaded
  int ahead = depth - 1;    // loads to start before anything else
  bool ready = false;
#pragma unroll 1
  while (true) {
    if (S::kPlainLoop && ready && fresh.begin == fresh.end && depth > 1 && plan.inner == 0.f) {
      // tiles that need no look at single keys, neither to load nor to attend to: most of a long context
      int n = cursor.plain(free_low, free_high, S::kKeys, S::kKeys);
      const int loads = loader.plain();
      if (to_load > loads) n = least(n, loads);
#pragma unroll 1
      for (to_do -= most(n, 0); n > 0; --n) {
        if (depth == 3) {
          wait_groups<1>();
        } else {
          wait_groups(depth - 2);
        }
        tile_barrier<S>();
        if (to_load > 0) {
          --to_load;
          loader.issue_plain(ring + next * S::kStage);
          next = next + 1 == depth ? 0 : next + 1;
        }
        close_group();
        cursor.step(S::kKeys);
        const uint32_t keys = ring + stage * S::kStage;
        stage = stage + 1 == depth ? 0 : stage + 1;
        float s[S::kWarpKeys / 8][4];
        uint32_t weights[S::kWarpKeys / 16][4];
        make_scores<S>(s, fragments, keys);
        update<S>(state, s, plan.scale, weights);
        add_values<S>(state, fragments, weights, keys + S::kMatrix);
      }
    }
    const bool is_fresh = ahead == 0 && fresh.begin < fresh.end;
    const bool begins = ahead == 0 && !ready;
    int key = fresh.begin * S::kKeys;
    uint32_t keys = ring + (depth - 1) * S::kStage;
    if (begins) {
      // queries and new rows are read while the first tiles are under way
      load_queries<S>(p, plan, job.at, job.valid, query_tile);
      state.clear();
    }
    if (is_fresh) {
      // into the last stage, which is not loaded yet
      if (!begins) __syncthreads();
      load_fresh<S>(p, plan, rows, job.at.b, job.at.hk, key, job.at.first_row == 0, stages + (depth - 1) * S::kStage);
    }
    if (begins || is_fresh) block_barrier<S>();
    if (begins) {
      fragments.read_queries();
      ready = true;
    }
    if (is_fresh) {
      ++fresh.begin;
      if (key + first >= p.T) continue;
    } else {
      if (ahead == 0) {
        if (to_do-- == 0) break;
        if (depth > 1) wait_groups(depth - 2);
        tile_barrier<S>();
      }
      if (to_load > 0) {
        --to_load;
        loader.issue(p, session, hull, job.at.b, job.at.hk, ring + next * S::kStage);
        next = next + 1 == depth ? 0 : next + 1;
      }
      close_group();
      if (ahead > 0) {
        --ahead;
        continue;
      }
      if (depth == 1) {
        wait_groups<0>();
        tile_barrier<S>();
      }
      if (cursor.next(S::kKeys)) {
        const Run& run = runs[cursor.run];
        segment = run.segment, free_low = run.free_low, free_high = run.free_high;
      }
      key = cursor.key;
      keys = ring + stage * S::kStage;
      stage = stage + 1 == depth ? 0 : stage + 1;
    }
    float s[S::kWarpKeys / 8][4];
    uint32_t weights[S::kWarpKeys / 16][4];
    make_scores<S>(s, fragments, keys);
    if (plan.inner != 0.f) cap_scores<S>(s, plan.inner, plan.outer);
    if (is_fresh) {
      mask_fresh<S>(s, rows, t, session.views, p.T, key + first);
    } else if (key < free_low || key + S::kKeys > free_high) {
      const View& view = session.views[segment];
      Sight sights[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int4 seen = rows.sights[t[i]];
        sights[i] = segment ? Sight{seen.z, least(seen.w, view.held)} : Sight{seen.x, least(seen.y, view.held)};
      }
      mask_old<S>(s, sights, view.sinks, key + first);
    }
    update<S>(state, s, plan.scale, weights);
    add_values<S>(state, fragments, weights, keys + S::kMatrix);
  }
  wait_groups<0>();
}

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
  const int C = cluster_size(), rank = blockIdx.x % C, worker = blockIdx.x / C;
  const Target& at = job.at;
  const int valid = job.valid;
  const int first_worker = divide(job.begin, job.share);
  const int workers = divide(job.begin + job.steps - 1, job.share) - first_worker + 1;
  constexpr int kFours = S::D / 4;
  float2* joined = statistics + S::kWarpsS * S::kRows;
  const auto warps = [&](int row, int column) {
    Part part = nothing();
    join<S::kWarpsS, true>(
        part, S::kWarpsS, [&](int i) { return statistics[i * S::kRows + row]; },
        [&](int i) { return *reinterpret_cast<float4*>(out + (i * S::kRows + row) * S::kOutRow + column); });
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
    mine = part_of(mine, rank, C);
    cluster_barrier();
  }
  const uint32_t out_address = shared_address(out), joined_address = shared_address(joined);
  const bool alone = workers == 1;
  const Partial<S> partial(p.partials, worker, worker * job.share >= job.begin);
  for (int i = mine.begin + static_cast<int>(threadIdx.x); i < mine.end; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    Part part = nothing();
    if (C == 1) {
      part = warps(row, column);
    } else {
      join<8, false>(
          part, C, [&](int r) { return load_remote2(remote(joined_address + row * 8, r)); },
          [&](int r) { return load_remote4(remote(out_address + (row * S::kOutRow + column) * 4, r)); });
    }
    if (alone) {
      finish<S>(p, plan, at, rows, row, column, part);
    } else {
      partial.put(row, column, part);
    }
  }
  // others may still read this block's shared memory
  if (C > 1) cluster_barrier_after_reads();
  if (alone) return;
  uint32_t* counter = p.counters + (int64_t{at.b} * p.HK * plan.tiles_m + job.item) * C + rank;
  if (!arrive_last(counter, workers, flag)) return;
  for (int i = mine.begin + static_cast<int>(threadIdx.x); i < mine.end; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    Part part = nothing();
#pragma unroll 1
    for (int w = 0; w < workers; w += 4) {
      const auto from = [&](int i) {
        const int other = first_worker + w + i;
        return Partial<S>(p.partials, other, other * job.share >= job.begin);
      };
      join<4, true>(
          part, workers - w, [&](int i) { return from(i).statistics(row); },
          [&](int i) { return from(i).values(row, column); });
    }
    finish<S>(p, plan, at, rows, row, column, part);
  }
}

// The constant cache is cold at first, and a warp waits for each line of the arguments that it needs: here the warps
// bring them in side by side. `anywhere`: room for a word per thread, or the compiler would drop what nobody reads.
template <class S, typename Arguments>
__device__ __forceinline__ void touch(const Arguments& arguments, uint32_t* anywhere) {
  constexpr int kLine = 16, kLines = (sizeof(Arguments) / 4 + kLine - 1) / kLine;  // of 4-byte words
  const auto* words = reinterpret_cast<const uint32_t*>(&arguments);
  const int line = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kLines; i += S::kThreads / 32) {
    if (i + line < kLines) anywhere[threadIdx.x] = words[(i + line) * kLine];
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    incremental_prefill_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(1024) char memory[];
  using Layout = Header<S>;
  let_next_launch_begin();
  touch<S>(p, reinterpret_cast<uint32_t*>(memory + Layout::bytes(p.T, p.B)));
  wait_for_launch_before();
  int* scratch = reinterpret_cast<int*>(memory);
  float2* statistics = reinterpret_cast<float2*>(memory + Layout::kScratch);
  const Rows2 rows{reinterpret_cast<int*>(memory + Layout::code(p.T)),
                   reinterpret_cast<int4*>(memory + Layout::sights())};
  int* prefix = reinterpret_cast<int*>(memory + Layout::prefix(p.T));
  char* query_tile = memory + Layout::bytes(p.T, p.B);
  char* stages = query_tile + S::kQuery;

  const int C = cluster_size(), worker = blockIdx.x / C, rank = blockIdx.x % C, workers = gridDim.x / C;
  const int items_each = p.HK * plan.tiles_m;
  Session& session = *reinterpret_cast<Session*>(memory + Layout::kScratch + Layout::kStatistics);
  Item* items = reinterpret_cast<Item*>(reinterpret_cast<char*>(&session) + Layout::kSession);
  static_assert(sizeof(Item) * S::kThreads / 32 == Layout::kItems, "fits");
  int known = -1, total, share, each = 0;
  if (p.B == 1) {
    read_session<S>(p, 0, rows, scratch, session);
    known = 0;
    const int steps = steps_of(session, p.T, S::kKeys);
    const Shares shares = even_shares(items_each, steps, workers, plan.workers_each, plan.smallest, C);
    each = shares.per_item > 0 ? shares.per_item : steps;
    total = each * items_each;
    share = shares.share;
  } else {
    plan_sessions<S>(p, items_each, prefix);
    total = prefix[p.B];
    share = uneven_share(total, workers, plan.smallest);
  }
  Job& job = *reinterpret_cast<Job*>(reinterpret_cast<char*>(&session) + 128);
  static_assert(sizeof(Session) <= 128 && sizeof(Job) <= Layout::kSession - 128, "fits");
  int now = worker * share, until = least(now + share, total);
#pragma unroll 1
  while (now < until) {
    int b = 0, before = 0;
    if (p.B > 1) {
      // the last session that begins at or before `now`
      for (int step = kMaxSessions / 2; step > 0; step /= 2) {
        if (b + step < p.B && prefix[b + step] <= now) b += step;
      }
      before = prefix[b];
      each = divide(prefix[b + 1] - before, items_each);
      if (b != known) read_session<S>(p, b, rows, scratch, session);
      known = b;
    }
    if (threadIdx.x == 0) {
      job.item = divide(now - before, each);
      job.begin = before + job.item * each;
      job.steps = steps_of(session, p.T, S::kKeys);
      job.at.b = b;
      job.at.hk = divide(job.item, plan.tiles_m);
      job.at.first_row = (job.item - job.at.hk * plan.tiles_m) * S::kRows;
      job.valid = least(S::kRows, p.T * plan.R - job.at.first_row);
      job.share = share, job.until = until, job.each = each;
      job.now = job.begin + each;
      const Range part = part_of({now - job.begin, least(until - job.begin, job.steps)}, rank, C);
      const int counted = counted_fresh(p.T, S::kKeys), old = session.old();
      job.fresh = {least(part.begin, counted), least(part.end, counted)};
      if (counted == 0 && part.begin == 0 && part.end > 0) job.fresh = {0, ceil_div(p.T, S::kKeys)};
      job.old = {least(most(part.begin - counted, 0), old), least(most(part.end - counted, 0), old)};
    }
    __syncthreads();
    const bool idle = job.fresh.begin == job.fresh.end && job.old.begin == job.old.end;
    float* out = reinterpret_cast<float*>(query_tile);
    if (!idle) {
      State<S> state;
      attend<S>(p, plan, rows, session, job, items, state, query_tile, stages);
      __syncthreads();
      park<S>(state, job.valid, out, statistics);
    }
    __syncthreads();
    merge<S>(p, plan, rows, job, idle, out, statistics, scratch);
    // before the barrier: behind it the next job is written
    now = job.now, until = job.until, share = job.share, each = job.each;
    __syncthreads();
  }
}

}  // namespace sk::incremental_prefill
