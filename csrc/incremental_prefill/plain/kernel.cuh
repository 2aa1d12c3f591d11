// incremental_prefill of one session whose rows all see every key before them, on Hopper: the step of a live stream.
// The same work as kernel.cuh's, for its latency.
//
// An item is a tile of query rows of one key head. A cluster of blocks has a part of an item's keys, its blocks equal
// shares. In a block one warpgroup loads tiles of 64 keys, two attend, nobody waits for the block: barriers in shared
// memory say which tile is full and which is empty. Queries and new rows are asked for beside the lengths, from
// addresses that are known before the launch before is complete; readers turn the queries while loaders find out which
// tiles are the block's. When a block has attended, the maxima and sums of its rows go ahead of the rows: loaders work
// out what every block's part weighs while the parts are on their way.
#pragma once

#include "incremental_prefill/plain/attend.cuh"
#include "incremental_prefill/touch.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::incremental_prefill {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    plain_prefill_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
#if SK_WGMMA
  extern __shared__ __align__(1024) char memory[];
  using Layout = PlainLayout<S>;
  const uint32_t base = shared_address(memory);
  const bool reads = threadIdx.x < S::kReaders;
  let_next_launch_begin();
  touch<S>(p, reinterpret_cast<uint32_t*>(memory + Layout::kTouched));
  Rank rank;
  rank.blocks = cluster_blocks();
  rank.block = cluster_rank();
  const int items = p.HK * plan.tiles_m, cluster = cluster_index();
  const int part = divide(cluster, items);
  rank.item = cluster - part * items;
  rank.at.b = 0;
  rank.at.hk = divide(rank.item, plan.tiles_m);
  rank.at.first_row = (rank.item - rank.at.hk * plan.tiles_m) * S::kRows;
  rank.valid = least(S::kRows, p.T * plan.R - rank.at.first_row);
  rank.own_rows = plan.own_rows;
  rank.mine = most(0, least(rank.own_rows, rank.valid - rank.block * rank.own_rows));
  const uint32_t received = base + Layout::kReceived, known = base + Layout::kKnown, told = base + Layout::kTold;
  if (!reads) {
    // a warp makes one at a time, so all warps do: of the keys and of the values of a stage
    const int n = threadIdx.x % 32 * (S::kLoaders / 32) + threadIdx.x / 32 % (S::kLoaders / 32);
    if (n < 2 * plan.stages) {
      barrier_init(base + Layout::kFull + 8 * n, S::kLoaders);
      barrier_init(base + Layout::kEmpty + 8 * n, 4 * S::kRowGroups);
    }
    if (threadIdx.x == S::kReaders) {
      barrier_init(received, 1);
      barrier_init(known, 1 + 128 * S::kRowGroups);
      barrier_init(told, 1);
      barrier_publish();
      barrier_expect(received, (rank.blocks - 1) * rank.mine * S::kRow);
      barrier_expect(known, (rank.blocks - 1) * rank.mine * 8);
    }
    // loaders go on when loaders are here, readers when all are
    meet<kLoadersMeet, S::kLoaders>();
    tell<kLoadersReady, S::kThreads>();
  }
  cluster_arrive();
  // all that can be worked out now, since the launch before will be waited for
  float by_blocks = reciprocal(rank.blocks), by_all = reciprocal(plan.workers_each);
  asm volatile("" : "+f"(by_blocks), "+f"(by_all));
  const bool may_be_fresh = part == 0 && rank.block == 0;
  Queries<S> queries;
  NewRows<S> fresh;
  if (reads) {
    queries.aim(p, plan, rank.at, rank.valid);
  } else if (may_be_fresh) {
    fresh.aim(p, rank.at.hk);
  }

  wait_for_launch_before();
  Walk walk;
  Walk* const walk_of_block = reinterpret_cast<Walk*>(memory + Layout::kWalk);
  char* const stages = memory + Layout::kStages;
  char *const parked = stages + S::kExchange, *const statistics = memory + Layout::kStatistics;
  float* const weights = reinterpret_cast<float*>(memory + Layout::kWeights);
  if (reads) {
    queries.fetch(p, rank.valid);
    queries.put(p, plan, rank.valid, memory + Layout::kQueries);
    publish();
    // barriers are made, queries are there
    meet<kLoadersReady, S::kThreads>();
    barrier_wait(told, 0);
    walk = *walk_of_block;
    if (part >= walk.parts) return;
    State<S> state;
    state.clear();
    Attention<S>{p, plan, walk, rank, base, state}.run();
    // all are done with the tiles
    meet<kReadersMeet, S::kReaders>();
    cluster_wait();
    leave<S, 0>(state, rank, stages, parked, statistics, known);
    publish();
    meet<kParked, S::kThreads>();
    keep<S>(rank, parked, memory + plan.inbox);
  } else {
    const int length[2] = {length_at(p, 0, 0), length_at(p, 0, 1)};
    if (may_be_fresh) fresh.fetch(p);
    const Session session = plain_session(p, p.segment, p.T, length, S::kKeys);
    walk.held_source = session.views[0].held, walk.held_target = session.views[1].held;
    walk.length = p.segment == kTarget ? session.views[1].length : session.views[0].length;
    walk.source_tiles = session.tiles[0].tiles;
    const int old = session.old(), parts = least(plan.workers_each, most(1, old >> plan.smallest));
    const float by = parts == plan.workers_each ? by_all : reciprocal(parts);
    const Range mine{divide(old * part, parts, by), divide(old * (part + 1), parts, by)};
    walk.parts = parts;
    walk.fresh = may_be_fresh;
    walk.old = cut(mine, rank.block, rank.blocks, by_blocks, part == 0);
    if (threadIdx.x == S::kReaders) {
      *walk_of_block = walk;
      barrier_arrive(told);
    }
    if (part >= parts) return;
    Loading<S> loading{p, plan, walk, rank.at.hk, base};
#pragma unroll 1
    for (int j = 0; j < walk.old_tiles(); ++j) loading.load(j);
    if (walk.fresh) loading.put(fresh, rank.at.first_row == 0, stages);
    cluster_wait();
    const Sending<S> sending(rank, parked, memory + plan.inbox, received);
    meet<kParked, S::kThreads>();
    sending.begin();
    barrier_wait(known, 0);
    weigh_parts<S>(p, plan, rank, part, walk.parts, reinterpret_cast<const float2*>(statistics), weights);
  }
  join<S>(p, plan, rank, part, walk.parts, memory + plan.inbox, weights, received,
          reinterpret_cast<uint32_t*>(memory + Layout::kFlag));
  cluster_wait();
#endif
}

}  // namespace sk::incremental_prefill
