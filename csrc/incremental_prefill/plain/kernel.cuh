// incremental_prefill of one session whose rows all see every key before them, on Hopper: the step of a live stream.
// The same work as kernel.cuh's, for its latency.
//
// An item is a tile of query rows of one key head. A cluster of blocks has a part of an item's keys, its blocks equal
// shares. In a block one warpgroup loads tiles of 64 keys, two attend, nobody waits for the block: barriers in shared
// memory say which tile is full and which is empty. Queries and new rows are asked for beside the lengths.
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
  touch<S>(p, reinterpret_cast<uint32_t*>(memory + Layout::kQueries));
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
  const uint32_t received = base + Layout::kReceived;
  if (!reads) {
    // a warp makes one at a time, so all warps do: of the keys and of the values of a stage
    const int n = threadIdx.x % 32 * (S::kLoaders / 32) + threadIdx.x / 32 % (S::kLoaders / 32);
    if (n < 2 * plan.stages) {
      barrier_init(base + Layout::kFull + 8 * n, S::kLoaders);
      barrier_init(base + Layout::kEmpty + 8 * n, 4 * S::kRowGroups);
    }
    if (threadIdx.x == S::kReaders) {
      barrier_init(received, 1);
      barrier_publish();
      barrier_expect(received, (rank.blocks - 1) * rank.mine * S::kRow);
    }
    // loaders go on when loaders are here, readers when all are
    meet<kLoadersMeet, S::kLoaders>();
    tell<kLoadersReady, S::kThreads>();
  }
  cluster_arrive();
  float by_blocks = reciprocal(rank.blocks), by_all = reciprocal(plan.workers_each);
  asm volatile("" : "+f"(by_blocks), "+f"(by_all));  // now, since lengths will be waited for

  wait_for_launch_before();
  const int length[2] = {length_at(p, 0, 0), length_at(p, 0, 1)};
  const bool may_be_fresh = part == 0 && rank.block == 0;
  Walk walk;
  int parts;
  const auto plan_walk = [&] {
    const Session session = plain_session(p, p.segment, p.T, length, S::kKeys);
    walk.held_source = session.views[0].held, walk.held_target = session.views[1].held;
    walk.length = p.segment == kTarget ? session.views[1].length : session.views[0].length;
    walk.source_tiles = session.tiles[0].tiles;
    const int old = session.old();
    parts = least(plan.workers_each, most(1, old >> plan.smallest));
    const float by = parts == plan.workers_each ? by_all : reciprocal(parts);
    const Range mine{divide(old * part, parts, by), divide(old * (part + 1), parts, by)};
    walk.fresh = may_be_fresh;
    walk.old = cut(mine, rank.block, rank.blocks, by_blocks, part == 0);
    return part < parts;
  };
  char* const stages = memory + Layout::kStages;
  if (reads) {
    Queries<S> queries;
    queries.fetch(p, plan, rank.at, rank.valid);
    meet<kLoadersReady, S::kThreads>();
    if (!plan_walk()) return;
    queries.put(p, plan, rank.valid, memory + Layout::kQueries);
    publish();
    meet<kReadersMeet, S::kReaders>();
    State<S> state;
    state.clear();
    Attention<S>{p, plan, walk, rank, base, state}.run();
    // all are done with the tiles
    meet<kReadersMeet, S::kReaders>();
    char* const parked = stages + S::kExchange;
    if constexpr (S::kKeyGroups > 1) join_groups<S>(state, rank, stages);
    park<S>(state, rank, parked);
    publish();
    meet<kReadersMeet, S::kReaders>();
    cluster_wait();
    send<S>(rank, parked, memory + plan.inbox, received);
  } else {
    NewRows<S> fresh;
    if (may_be_fresh) fresh.fetch(p, rank.at.hk);
    if (!plan_walk()) return;
    Loading<S> loading{p, plan, walk, rank.at.hk, base};
#pragma unroll 1
    for (int j = 0; j < walk.old_tiles(); ++j) loading.load(j);
    if (walk.fresh) loading.put(fresh, rank.at.first_row == 0, stages);
    cluster_wait();
  }
  barrier_wait(received, 0);
  // this block has what was sent to it: the others may leave
  cluster_arrive();
  __syncthreads();
  join<S>(p, plan, rank, part, parts, memory + plan.inbox, reinterpret_cast<uint32_t*>(memory + Layout::kFlag));
  cluster_wait();
#endif
}

}  // namespace sk::incremental_prefill
