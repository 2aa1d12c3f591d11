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
#include "incremental_prefill/join.cuh"
#include "incremental_prefill/touch.cuh"
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
                                       const Job& job, Item* items, Intake<S>& intake, State<S>& state,
                                       char* query_tile, char* stages) {
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
    const Hull found = plan.plain ? hull_of_all(session)
                                  : hull_of(rows, divide_by_R(plan, job.at.first_row),
                                            divide_by_R(plan, job.at.first_row + job.valid - 1));
    if (lane == 4) item.hull = found;
    if (lane < 4) runs[lane] = run_of<S>(p, session, found, job.old, lane);
    __syncwarp();
  }
  // new rows go into the last stage, which is not loaded at first
  const auto last = [&] { return stages + (depth - 1) * S::kStage; };
  const bool taken = Intake<S>::kHoldsNew && intake.fresh > 0;
  if constexpr (S::kEager) intake.put_queries(p, plan, job.valid, query_tile, 0);
  if constexpr (!S::kEager || Intake<S>::kRounds > 1) {
#pragma unroll 1
    for (int round = S::kEager; round < Intake<S>::kRounds; ++round) {
      intake.fetch_queries(p, plan, job.at, job.valid, round);
      intake.put_queries(p, plan, job.valid, query_tile, round);
    }
  }
  intake.put_new(p, rows, job.at, job.at.first_row == 0, last());
  if (!plan.wide_q) load_queries_slowly<S>(p, plan, job.at, job.valid, query_tile);
  int to_load = runs[0].tiles + runs[1].tiles + runs[2].tiles + runs[3].tiles, to_do = to_load;
  Loader<S> loader(runs);
  Cursor cursor{runs};
  int segment = 0, free_low = 0, free_high = 0;
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
          loader.issue_plain(ring + next * S::kStage, plan.keep);
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
    if (is_fresh && !taken) {
      if (!begins) __syncthreads();
      load_fresh<S>(p, plan, rows, job.at.b, job.at.hk, key, job.at.first_row == 0, last());
    }
    if (begins || is_fresh) block_barrier<S>();
    if (begins) {
      fragments.read_queries();
      state.clear();
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
        loader.issue(p, session, hull, job.at.b, job.at.hk, ring + next * S::kStage, plan.keep);
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
    if (is_fresh || key < free_low || key + S::kKeys > free_high) {
      // the thread's two rows
      int t[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        t[i] = least(divide_by_R(plan, job.at.first_row + warp_m * 16 + lane / 4 + 8 * i), p.T - 1);
      }
      if (is_fresh) {
        const View& own = session.views[p.segment == kTarget];
        if (S::kEager && S::D <= 128 && plan.plain && own.held == own.length && own.end == own.total) {
          mask_causal<S>(s, t, key + first);
        } else {
          mask_fresh<S>(s, rows, t, session.views, p.T, key + first);
        }
      } else {
        const View& view = session.views[segment];
        Sight sights[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int4 seen = rows.sights[t[i]];
          sights[i] = segment ? Sight{seen.z, least(seen.w, view.held)} : Sight{seen.x, least(seen.y, view.held)};
        }
        mask_old<S>(s, sights, view.sinks, key + first);
      }
    }
    update<S>(state, s, plan.scale, weights);
    add_values<S>(state, fragments, weights, keys + S::kMatrix);
  }
  wait_groups<0>();
}

// The item at step `now` of the list, which its session begins at `before`, and what this block does of it: all that
// follows from where and whose it is.
template <class S>
__device__ __forceinline__ void set_job(const Params& p, const Plan& plan, const Session& session, int before, int now,
                                        Job& job) {
  job.item = divide(now - before, job.each);
  job.begin = before + job.item * job.each;
  job.steps = plan.begin + steps_of(session, p.T, S::kKeys);
  job.at.hk = divide(job.item, plan.tiles_m);
  job.at.first_row = (job.item - job.at.hk * plan.tiles_m) * S::kRows;
  job.valid = least(S::kRows, p.T * plan.R - job.at.first_row);
  job.now = job.begin + job.each;
  const Range whole{most(now - job.begin - plan.begin, 0), least(job.until - job.begin, job.steps) - plan.begin};
  job.empty = whole.end <= 0;
  const int log = cluster_log(), rank = blockIdx.x & ((1 << log) - 1);
  const Range part = part_of(whole, rank, log);
  const int counted = counted_fresh(p.T, S::kKeys), old = session.old();
  job.fresh = {least(part.begin, counted), least(part.end, counted)};
  job.old = {least(most(part.begin - counted, 0), old), least(most(part.end - counted, 0), old)};
  if (counted > 0 || whole.begin > 0) return;
  // few new rows ride along with the first block of the first cluster
  if (rank == 0) job.fresh = {0, ceil_div(p.T, S::kKeys)};
  if (log > 0) job.old = beside_fresh({0, least(whole.end, old)}, rank, log);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    incremental_prefill_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(1024) char memory[];
  using Layout = Header<S>;
  let_next_launch_begin();
  touch<S>(p, reinterpret_cast<uint32_t*>(memory + Layout::bytes(p.T, p.B)));
  int* scratch = reinterpret_cast<int*>(memory);
  float2* statistics = reinterpret_cast<float2*>(memory + Layout::kScratch);
  const Rows2 rows{reinterpret_cast<int*>(memory + Layout::code(p.T)),
                   reinterpret_cast<int4*>(memory + Layout::sights())};
  int* prefix = reinterpret_cast<int*>(memory + Layout::prefix(p.T));
  char* query_tile = memory + Layout::bytes(p.T, p.B);
  char* stages = query_tile + S::kQuery;

  const int items_each = p.HK * plan.tiles_m;
  const auto workers = [] { return static_cast<int>(gridDim.x >> cluster_log()); };
  const auto cut = [&](int steps) {
    return even_shares(items_each, steps, workers(), plan.workers_each, plan.smallest, 1 << cluster_log());
  };
  Session& session = *reinterpret_cast<Session*>(memory + Layout::kScratch + Layout::kStatistics);
  Item* items = reinterpret_cast<Item*>(reinterpret_cast<char*>(&session) + Layout::kSession);
  static_assert(sizeof(Item) * S::kThreads / 32 == Layout::kItems, "fits");
  Job& job = *reinterpret_cast<Job*>(reinterpret_cast<char*>(&session) + 128);
  static_assert(sizeof(Session) <= 128 && sizeof(Job) <= Layout::kSession - 128, "fits");
  // lengths say how many workers share an item, but, where items are alike and cut evenly, not which item a worker has:
  // its queries are fetched beside the lengths
  bool guessing = S::kEager && plan.plain && plan.workers_each > 0;
  wait_for_launch_before();
  int worker = blockIdx.x >> cluster_log(), known = -1, share = 1, each = 1, now = 0, until = 1;
  if (p.B > 1) {
    plan_sessions<S>(p, items_each, plan.begin, prefix);
    const int total = prefix[p.B];
    share = uneven_share(total, workers(), plan.smallest);
    now = worker * share, until = least(now + share, total);
  }
#pragma unroll 1
  while (now < until) {
    Intake<S> intake;
    bool fetched = false;
    int turn = 0, guess = 0, length[2] = {0, 0};
#pragma unroll 1
    while (true) {
      if (!guessing) {
        int b = 0, before = 0;
        if (p.B > 1) {
          // the last session that begins at or before `now`
          for (int step = kMaxSessions / 2; step > 0; step /= 2) {
            if (b + step < p.B && prefix[b + step] <= now) b += step;
          }
          before = prefix[b];
          each = divide(prefix[b + 1] - before, items_each);
        }
        if (b != known) {
          read_session<S>(p, b, rows, scratch, session);
          known = b;
          if (p.B == 1) {
            each = steps_of(session, p.T, S::kKeys);
            const Shares shares = cut(each);
            if (shares.per_item > 0) each = shares.per_item;
            share = shares.share;
            now = worker * share, until = least(now + share, each * items_each);
            if (now >= until) return;
          }
        }
        if (threadIdx.x == 0) {
          job.at.b = b;
          job.worker = worker, job.share = share, job.until = until, job.each = each;
          set_job<S>(p, plan, session, before, now, job);
        }
        __syncthreads();
        if (job.empty) return;
        if (fetched) break;
      }
      Target at{0, 0, 0};
      bool attends;  // to all new rows at once
      if (guessing) {
        turn = divide(worker, items_each), guess = worker - turn * items_each;
        length[0] = length_at(p, 0, 0), length[1] = length_at(p, 0, 1);
        at.hk = divide(guess, plan.tiles_m);
        at.first_row = (guess - at.hk * plan.tiles_m) * S::kRows;
        attends =
            worker < items_each && (blockIdx.x & ((1 << cluster_log()) - 1)) == 0 && counted_fresh(p.T, S::kKeys) == 0;
      } else {
        at = job.at;
        attends = job.fresh.begin == 0 && job.fresh.end == 1 && p.T <= S::kKeys;
      }
      if constexpr (S::kEager) {
        intake.fetch_queries(p, plan, at, least(S::kRows, p.T * plan.R - at.first_row), 0);
      }
      intake.fetch_new(p, plan, at, attends ? p.T : 0);
      if (!guessing) break;
      guessing = false;
      known = 0;
      const Session found = read_plain_session<S>(p, length, rows);
      if (threadIdx.x == 0) session = found;
      each = steps_of(found, p.T, S::kKeys);
      const Shares shares = cut(each);
      share = shares.share;
      fetched = shares.per_item > 0;
      if (fetched) {
        each = shares.per_item;
        if (turn * share >= each) return;
        now = guess * each + turn * share, until = now + share;
        worker = divide(now, share);
      } else {
        now = worker * share, until = least(now + share, each * items_each);
        if (now >= until) return;
      }
    }
    const bool idle = job.fresh.begin == job.fresh.end && job.old.begin == job.old.end;
    float* out = reinterpret_cast<float*>(query_tile);
    if (!idle) {
      State<S> state;
      attend<S>(p, plan, rows, session, job, items, intake, state, query_tile, stages);
      __syncthreads();
      park<S>(state, job.valid, out, statistics);
    }
    __syncthreads();
    merge<S>(p, plan, rows, job, idle, out, statistics, scratch);
    // before the barrier: behind it the next job is written
    now = job.now, until = job.until, share = job.share, each = job.each, worker = job.worker;
    known = job.at.b;
    __syncthreads();
  }
}

}  // namespace sk::incremental_prefill
