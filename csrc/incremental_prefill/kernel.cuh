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
#include "incremental_prefill/instance.h"
#include "incremental_prefill/merge.cuh"
#include "incremental_prefill/rotate.cuh"

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

// The rows of the tile among the packed queries into shared memory, rotated. What lies behind them stays as it is: no
// row ever reaches another one.
template <class S>
__device__ __forceinline__ void load_queries(const Params& p, const Plan& plan, const Target& at, int valid,
                                             char* tile) {
  using Element = typename S::Element;
  const auto row_of = [&](int row, int& t) {
    const int m = at.first_row + row;
    t = divide_by_R(plan, m);
    const int h = at.hk * plan.R + m - t * plan.R;
    return static_cast<const Element*>(p.q.data) + at.b * p.q.batch + h * p.q.head + t * p.q.row;
  };
  const uint32_t keep = plan.sign == 0.f ? 0u : ~0u, flip = plan.sign < 0.f ? 0x80008000u : 0u;
  if (plan.wide_q) {
    constexpr int kPairs = S::D / 16, kInFlight = 1;
#pragma unroll 1
    for (int base = threadIdx.x; base < valid * kPairs; base += kInFlight * S::kThreads) {
      Pairs<Element> pairs[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = base + u * S::kThreads;
        if (i >= valid * kPairs) break;
        int t;
        const Element* q = row_of(i / kPairs, t);
        pairs[u].load(p, q, at.b, t, i % kPairs);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = base + u * S::kThreads;
        if (i >= valid * kPairs) break;
        pairs[u].turn(p.interleaved);
        for (Chunk<Element, 8>* c : {&pairs[u].a, &pairs[u].b}) {
          uint4& x = c->bits;
          x = make_uint4((x.x & keep) ^ flip, (x.y & keep) ^ flip, (x.z & keep) ^ flip, (x.w & keep) ^ flip);
        }
        *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kRows>(i / kPairs, pairs[u].first / 8)) = pairs[u].a.bits;
        *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kRows>(i / kPairs, pairs[u].second / 8)) = pairs[u].b.bits;
      }
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < valid * S::D; i += S::kThreads) {
      const int row = i / S::D, column = i % S::D;
      int t;
      const Element* q = row_of(row, t);
      Element x = rotated_element(p, q, at.b, t, column);
      x.bits = static_cast<uint16_t>((x.bits & keep) ^ flip);
      reinterpret_cast<Element*>(tile + chunk_at<S::D, S::kRows>(row, column / 8))[column % 8] = x;
    }
  }
}

// Where row t of a segment's new rows belongs: addresses of its k and v in the cache, null if nowhere.
template <typename Element>
struct Home {
  Element *k = nullptr, *v = nullptr;

  __device__ __forceinline__ void find(const Params& p, const Rows2& rows, int b, int hk, int t, bool report) {
    const int code = rows.code[t];
    const int role = code != kNoKey ? segment_of(code) : rows.sights[t].y < 0 ? -1 : role_at(p, b, t);
    if (role < 0) return;
    const Segment& s = p.segments[role];
    const int slot = code == kNoKey ? kNoSlot : slot_of(index_of(code), s.capacity, p.ring_sinks, s.window > 0);
    if (slot != kNoSlot) {
      k = static_cast<Element*>(s.k.data) + b * s.k.batch + hk * s.k.head + slot * s.k.row;
      v = static_cast<Element*>(s.v.data) + b * s.v.batch + hk * s.v.head + slot * s.v.row;
    } else if (report) {
      atomicOr(p.status, 1 << role);
    }
  }
};

// New rows [first, first + kKeys) as a tile, k rotated; and, if `write`, to where they belong in the cache. Rows that
// are no keys become zeros.
template <class S>
__device__ __forceinline__ void load_fresh(const Params& p, const Plan& plan, const Rows2& rows, int b, int hk,
                                           int first, bool write, char* keys) {
  char* values = keys + S::kMatrix;
  using Element = typename S::Element;
  const int used = least(S::kKeys, ceil_div(p.T - first, S::kWarpKeys) * S::kWarpKeys);
  const int places = plan.wide_kv ? S::D / 16 : S::D;
#pragma unroll 1
  // from the last thread on: the first ones may be reading queries
  for (int i = S::kThreads - 1 - static_cast<int>(threadIdx.x); i < used * places; i += S::kThreads) {
    const int row = plan.wide_kv ? i / (S::D / 16) : i / S::D, place = i - row * places, t = first + row;
    const bool is_key = t < p.T && rows.code[t] != kNoKey;
    const Element* k = static_cast<const Element*>(p.k.data) + b * p.k.batch + hk * p.k.head + t * p.k.row;
    const Element* v = static_cast<const Element*>(p.v.data) + b * p.v.batch + hk * p.v.head + t * p.v.row;
    Home<Element> home;
    if (write && t < p.T) home.find(p, rows, b, hk, t, hk == 0 && place == 0);
    if (plan.wide_kv) {
      Pairs<Element> key{};
      uint4 value[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
      key.first = place * 16, key.second = place * 16 + 8;
      if (is_key) {
        key.load(p, k, b, t, place);
        value[0] = __ldg(reinterpret_cast<const uint4*>(v + key.first));
        value[1] = __ldg(reinterpret_cast<const uint4*>(v + key.second));
        key.turn(p.interleaved);
      }
      const int to[2] = {chunk_at<S::D, S::kKeys>(row, key.first / 8), chunk_at<S::D, S::kKeys>(row, key.second / 8)};
      *reinterpret_cast<uint4*>(keys + to[0]) = key.a.bits;
      *reinterpret_cast<uint4*>(keys + to[1]) = key.b.bits;
      *reinterpret_cast<uint4*>(values + to[0]) = value[0];
      *reinterpret_cast<uint4*>(values + to[1]) = value[1];
      if (home.k == nullptr) continue;
      *reinterpret_cast<uint4*>(home.k + key.first) = key.a.bits;
      *reinterpret_cast<uint4*>(home.k + key.second) = key.b.bits;
      *reinterpret_cast<uint4*>(home.v + key.first) = value[0];
      *reinterpret_cast<uint4*>(home.v + key.second) = value[1];
    } else {
      const int to = chunk_at<S::D, S::kKeys>(row, place / 8) + place % 8 * 2;
      const Element key = is_key ? rotated_element(p, k, b, t, place) : Element{0};
      const Element value = is_key ? v[place] : Element{0};
      *reinterpret_cast<Element*>(keys + to) = key;
      *reinterpret_cast<Element*>(values + to) = value;
      if (home.k == nullptr) continue;
      home.k[place] = key;
      home.v[place] = value;
    }
  }
}

// Neighbouring tiles of one segment, as the rows of one item see them. All bounds are stream indices.
struct Run {
  int segment, first, tiles;
  int whole_low, whole_high;  // keys in this range can be loaded without looking at each
  int free_low, free_high;    // keys in this range are seen by every row
  int unused;
};

// Run i of four: source sinks, source, target sinks, target; its part of the old tiles `old`, without those that no row
// of the item sees.
template <class S>
__device__ __forceinline__ Run run_of(const Params& p, const Session& session, const Hull& hull, Range old, int i) {
  const int segment = i / 2;
  const bool sinks = i % 2 == 0;
  const View& view = session.views[segment];
  const Tiles& tiles = session.tiles[segment];
  const int before = (segment ? session.tiles[0].count() : 0) + (sinks ? 0 : tiles.sinks);
  const int n = sinks ? tiles.sinks : tiles.tiles, base = sinks ? 0 : tiles.first;
  const int low = segment ? hull.begin_min[1] : hull.begin_min[0];
  const int high = least(segment ? hull.end_max[1] : hull.end_max[0], view.held);
  const int all_end = least(segment ? hull.end_min[1] : hull.end_min[0], view.held);
  int begin = base + least(most(old.begin - before, 0), n), end = base + least(most(old.end - before, 0), n);
  end = least(end, ceil_div(high, S::kKeys));
  if (!sinks) begin = most(begin, low / S::kKeys);
  Run run;
  run.segment = segment;
  run.first = begin * S::kKeys;
  run.tiles = most(end - begin, 0);
  run.whole_low = sinks ? 0 : low;
  run.whole_high = least(sinks ? least(view.sinks, high) : high, p.segments[segment].capacity);
  run.free_low = sinks ? 0 : segment ? hull.begin_max[1] : hull.begin_max[0];
  run.free_high = sinks ? least(view.sinks, all_end) : all_end;
  run.unused = 0;
  return run;
}

// What a block keeps of its item in shared memory, where it costs no registers during the products.
struct Job {
  Target at;
  int valid;               // rows of the tile
  int item, begin, steps;  // of all items of a session; first step in the list of all; steps
  int share, now, until, each;
  Range fresh, old;  // tiles of this block
};

// What a warp keeps of it.
struct Item {
  Run runs[4];
  Hull hull;
};

// Walks over the tiles of the runs [0, 4).
struct Cursor {
  const Run* runs;
  int run = -1, left = 0, key = 0;

  // true if another run was entered
  __device__ __forceinline__ bool next(int keys) {
    key += keys;
    if (--left > 0) return false;
    do {
      ++run;
      left = runs[run].tiles;
    } while (left == 0);
    key = runs[run].first;
    return true;
  }
};

// Loads the tiles of one item: each thread always the same chunks of the same rows of a tile.
template <class S>
struct Loader {
  using Element = typename S::Element;
  static constexpr int kThreads = S::kPrivate ? 32 : S::kThreads;
  static constexpr int kTotal = (S::kPrivate ? S::kWarpKeys : S::kKeys) * S::kChunks;
  static constexpr bool kEven = kThreads % S::kChunks == 0;  // a thread stays in its column
  static constexpr int kStep = kEven ? kThreads / S::kChunks : 1;

  Cursor cursor;
  int begin, whole_low, whole_high;  // first row of the tile that this thread's group loads
  const Element *k, *v;              // of the head, at this thread's first row and chunk

  __device__ __forceinline__ explicit Loader(const Run* runs)
      : cursor{runs}, begin(S::kPrivate ? threadIdx.x / 32 * S::kWarpKeys : 0) {}

  __device__ __forceinline__ void open(const Params& p, int b, int hk) {
    const Run& run = cursor.runs[cursor.run];
    const Segment& s = p.segments[run.segment];
    whole_low = run.whole_low, whole_high = run.whole_high;
    k = static_cast<const Element*>(s.k.data) + b * s.k.batch + hk * s.k.head;
    v = static_cast<const Element*>(s.v.data) + b * s.v.batch + hk * s.v.head;
  }

  // Starts the loads of the next tile into a stage.
  __device__ __forceinline__ void issue(const Params& p, const Session& session, const Hull& hull, int b, int hk,
                                        uint32_t stage) {
    if (cursor.next(S::kKeys)) open(p, b, hk);
    const int first = cursor.key + begin, thread = threadIdx.x % kThreads;
    const bool whole = first >= whole_low && first + kTotal / S::kChunks <= whole_high;
#pragma unroll 1
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Segment& segment = p.segments[cursor.runs[cursor.run].segment];
      const int64_t stride = matrix ? segment.v.row : segment.k.row;
      const Element* from = matrix ? v : k;
      const uint32_t to = stage + matrix * S::kMatrix;
      if (whole && kEven) {
        const int row = thread / S::kChunks, chunk = thread % S::kChunks;
        const Element* at = from + (first + row) * stride + chunk * 8;
        const uint32_t there = to + chunk_at<S::D, S::kKeys>(begin + row, chunk);
#pragma unroll
        for (int j = 0; j < kTotal / kThreads; ++j) {
          // kStep rows on: the row's place in its group of eight may change, by a constant
          copy_async((there ^ (j * kStep % 8 * 16)) + j * kStep * 128, at, true);
          at += kStep * stride;
        }
      } else {
        slowly(p, session, hull, from, stride, to, first, thread);
      }
    }
  }

  // The same for any tile, row by row. Rows that must not be read become zeros: what they hold may be NaN.
  __device__ __forceinline__ void slowly(const Params& p, const Session& session, const Hull& hull, const Element* from,
                                         int64_t stride, uint32_t to, int first, int thread) {
    const int segment = cursor.runs[cursor.run].segment;
    const View& view = session.views[segment];
    const int low = segment ? hull.begin_min[1] : hull.begin_min[0];
    const int high = least(segment ? hull.end_max[1] : hull.end_max[0], view.held);
    const int capacity = p.segments[segment].capacity;
    const bool ring = p.segments[segment].window > 0;
#pragma unroll 2
    for (int i = thread; i < kTotal; i += kThreads) {
      const int row = i / S::kChunks, chunk = i % S::kChunks, index = first + row;
      const bool seen = index < high && (index >= low || index < view.sinks);
      const int slot = seen ? slot_of(index, capacity, p.ring_sinks, ring) : kNoSlot;
      const bool valid = slot != kNoSlot;
      copy_async(to + chunk_at<S::D, S::kKeys>(begin + row, chunk), from + (valid ? slot : 0) * stride + chunk * 8,
                 valid);
    }
  }
};

// After a wait for one's own loads: all loads of the tile have arrived, and all warps are done with the tile before.
template <class S>
__device__ __forceinline__ void tile_barrier() {
  if constexpr (S::kWgmma) publish();
  if constexpr (S::kPrivate) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
template <class S>
__device__ __forceinline__ void block_barrier() {
  if constexpr (S::kWgmma) publish();
  __syncthreads();
}

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

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    incremental_prefill_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(1024) char memory[];
  using Layout = Header<S>;
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
    const Shares shares = even_shares(items_each, steps, workers, plan.workers_each, plan.smallest);
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
