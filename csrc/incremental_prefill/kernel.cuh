// incremental_prefill: one launch that rotates the new rows, writes them, and attends over source, target and themselves.
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

  static constexpr int kSession = 128;

  static SK_HOST_DEVICE int sights() { return kScratch + kSession + kStatistics; }
  static SK_HOST_DEVICE int code(int T) { return sights() + 16 * T; }
  static SK_HOST_DEVICE int prefix(int T) { return code(T) + 4 * T; }
  static SK_HOST_DEVICE int bytes(int T, int B) { return (prefix(T) + 4 * (B > 1 ? B + 1 : 0) + 1023) / 1024 * 1024; }
};

// Rows [first, first + kRows) of the packed queries into shared memory, rotated; rows that are none become zeros.
template <class S>
__device__ __forceinline__ void load_queries(const Params& p, const Plan& plan, const Target& at, int valid,
                                             char* tile) {
  using Element = typename S::Element;
  const int width = plan.wide_q ? 8 : 1, places = S::D / width;
  const uint32_t flip = plan.sign < 0.f ? 0x80008000u : 0u;
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kRows * places; i += S::kThreads) {
    const int row = i / places, column = i % places * width;
    const int m = at.first_row + row, t = m / at.R, h = at.hk * at.R + m % at.R;
    const Element* q = static_cast<const Element*>(p.q.data) + at.b * p.q.batch + h * p.q.head + t * p.q.row;
    const bool used = row < valid && plan.sign != 0.f;
    char* to = tile + chunk_at<S::D, S::kRows>(row, column / 8);
    if (plan.wide_q) {
      uint4 bits = used ? rotated_chunk(p, q, at.b, t, column / 8) : make_uint4(0, 0, 0, 0);
      bits.x ^= flip, bits.y ^= flip, bits.z ^= flip, bits.w ^= flip;
      *reinterpret_cast<uint4*>(to) = bits;
    } else {
      Element x = used ? rotated_element(p, q, at.b, t, column) : Element{0};
      x.bits ^= static_cast<uint16_t>(flip);
      reinterpret_cast<Element*>(to)[column % 8] = x;
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

// New rows [first, first + kKeys) as a tile, k rotated; and, if `write`, to where they belong in the cache.
template <class S>
__device__ __forceinline__ void load_fresh(const Params& p, const Plan& plan, const Rows2& rows, int b, int hk,
                                           int first, bool write, char* keys, char* values) {
  using Element = typename S::Element;
  const int used = least(S::kKeys, ceil_div(p.T - first, S::kWarpKeys) * S::kWarpKeys);
  const int width = plan.wide_kv ? 8 : 1, places = S::D / width;
#pragma unroll 1
  for (int i = threadIdx.x; i < used * places; i += S::kThreads) {
    const int row = i / places, column = i % places * width, t = first + row;
    const bool is_key = t < p.T && rows.code[t] != kNoKey;
    const Element* k = static_cast<const Element*>(p.k.data) + b * p.k.batch + hk * p.k.head + t * p.k.row;
    const Element* v = static_cast<const Element*>(p.v.data) + b * p.v.batch + hk * p.v.head + t * p.v.row;
    Home<Element> home;
    if (write && t < p.T) home.find(p, rows, b, hk, t, hk == 0 && column == 0);
    const int to = chunk_at<S::D, S::kKeys>(row, column / 8) + column % 8 * 2;
    if (plan.wide_kv) {
      uint4 key = make_uint4(0, 0, 0, 0), value = key;
      if (is_key) {
        value = __ldg(reinterpret_cast<const uint4*>(v + column));
        key = rotated_chunk(p, k, b, t, column / 8);
      }
      *reinterpret_cast<uint4*>(keys + to) = key;
      *reinterpret_cast<uint4*>(values + to) = value;
      if (home.k == nullptr) continue;
      *reinterpret_cast<uint4*>(home.k + column) = key;
      *reinterpret_cast<uint4*>(home.v + column) = value;
    } else {
      const Element key = is_key ? rotated_element(p, k, b, t, column) : Element{0};
      const Element value = is_key ? v[column] : Element{0};
      *reinterpret_cast<Element*>(keys + to) = key;
      *reinterpret_cast<Element*>(values + to) = value;
      if (home.k == nullptr) continue;
      home.k[column] = key;
      home.v[column] = value;
    }
  }
}

// What a block needs to know to load the tiles of one item.
template <class S>
struct Source {
  using Element = typename S::Element;
  const Params& p;
  const Session& session;
  const Hull& hull;
  int b, hk;

  // tile i of the session's old tiles: its segment and first key
  __device__ __forceinline__ int segment(int i) const { return i >= session.tiles[0].count(); }
  __device__ __forceinline__ int first_key(int i) const {
    const int before = session.tiles[0].count();
    return (i < before ? session.tiles[0].at(i) : session.tiles[1].at(i - before)) * S::kKeys;
  }
  __device__ __forceinline__ Keys<Element> keys(int segment) const {
    const Segment& s = p.segments[segment];
    const View& view = segment ? session.views[1] : session.views[0];
    Keys<Element> keys;
    keys.k = static_cast<const Element*>(s.k.data) + b * s.k.batch + hk * s.k.head;
    keys.v = static_cast<const Element*>(s.v.data) + b * s.v.batch + hk * s.v.head;
    keys.k_row = s.k.row, keys.v_row = s.v.row;
    keys.low = segment ? hull.begin_min[1] : hull.begin_min[0];
    keys.high = least(segment ? hull.end_max[1] : hull.end_max[0], view.held);
    keys.sinks = view.sinks;
    keys.capacity = s.capacity, keys.ring_sinks = p.ring_sinks, keys.ring = s.window > 0;
    return keys;
  }
  // whether some row of the tile's rows sees some key of it
  __device__ __forceinline__ bool useful(const Keys<Element>& keys, int first) const {
    return first < keys.high && (first + S::kKeys > keys.low || first < keys.sinks);
  }
  // whether every row sees every key of it
  __device__ __forceinline__ bool whole(int segment, int first) const {
    const View& view = segment ? session.views[1] : session.views[0];
    const int begin = segment ? hull.begin_max[1] : hull.begin_max[0];
    const int end = least(segment ? hull.end_min[1] : hull.end_min[0], view.held);
    return first + S::kKeys <= end && (first >= begin || first + S::kKeys <= view.sinks);
  }
  // Starts the loads of tile i into a stage, in two groups; two empty groups when there is no such tile.
  __device__ __forceinline__ void issue(int i, int end, uint32_t stage) const {
    if (i < end) {
      const Keys<Element> from = keys(segment(i));
      const int first = first_key(i);
      const bool wanted = useful(from, first);
      constexpr int kRows = S::kPrivate ? S::kWarpKeys : S::kKeys;
      constexpr int kCount = S::kPrivate ? 32 : S::kThreads;
      const int at = S::kPrivate ? threadIdx.x / 32 * S::kWarpKeys : 0, thread = threadIdx.x % kCount;
      if (wanted) load_rows<S, kRows, kCount>(stage, from.k, from.k_row, from, first + at, at, thread);
      close_group();
      if (wanted) load_rows<S, kRows, kCount>(stage + S::kMatrix, from.v, from.v_row, from, first + at, at, thread);
      close_group();
    } else {
      close_group();
      close_group();
    }
  }
};

// Waits for others that read or write the same part of shared memory.
template <class S>
__device__ __forceinline__ void tile_barrier() {
  if constexpr (S::kPrivate) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The item's share of this block: new tiles [fresh.begin, fresh.end), then old tiles [old.begin, old.end).
template <class S>
__device__ __forceinline__ void attend(const Params& p, const Plan& plan, const Rows2& rows, const Source<S>& source,
                                       const Target& at, int valid, Range fresh, Range old, bool write,
                                       State<S>& state, char* query_tile, char* stages) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % S::kWarpsM, first = warp / S::kWarpsM * S::kWarpKeys;
  const int depth = plan.stages;
  const uint32_t ring = shared_address(stages);
  for (int j = 0; j < depth - 1; ++j) source.issue(old.begin + j, old.end, ring + j * S::kStage);
  load_queries<S>(p, plan, at, valid, query_tile);
  __syncthreads();
  Query<S> query;
  query.set(shared_address(query_tile), warp_m * 16);
  int t[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    t[i] = least((at.first_row + warp_m * 16 + lane / 4 + 8 * i) / at.R, p.T - 1);
  }
  const int fresh_count = fresh.end - fresh.begin, count = fresh_count + old.end - old.begin;
  int stage = 0, next = depth - 1;  // stages of this tile and of the one that is loaded now
#pragma unroll 1
  for (int step = 0; step < count; ++step) {
    const bool is_fresh = step < fresh_count;
    const int tile = is_fresh ? fresh.begin + step : old.begin + step - fresh_count;
    int segment = 0, key = tile * S::kKeys;
    uint32_t keys = ring + (depth - 1) * S::kStage;
    if (is_fresh) {
      char* to = stages + (depth - 1) * S::kStage;
      if (step > 0) __syncthreads();
      load_fresh<S>(p, plan, rows, at.b, at.hk, key, write, to, to + S::kMatrix);
      __syncthreads();
      if (key + first >= p.T) continue;
    } else {
      tile_barrier<S>();
      source.issue(tile + depth - 1, old.end, ring + next * S::kStage);
      keys = ring + stage * S::kStage;
      next = stage;
      stage = stage + 1 == depth ? 0 : stage + 1;
      segment = source.segment(tile);
      key = source.first_key(tile);
      if (!source.useful(source.keys(segment), key)) continue;
      wait_groups(2 * depth - 1);
      tile_barrier<S>();
    }
    float s[S::kWarpKeys / 8][4];
    uint32_t weights[S::kWarpKeys / 16][4];
    make_scores<S>(s, query, keys, first);
    if (plan.inner != 0.f) cap_scores<S>(s, plan.inner, plan.outer);
    if (is_fresh) {
      mask_fresh<S>(s, rows, t, source.session.views, p.T, key + first);
    } else if (!source.whole(segment, key)) {
      const View& view = segment ? source.session.views[1] : source.session.views[0];
      Sight sights[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int4 seen = rows.sights[t[i]];
        sights[i] = segment ? Sight{seen.z, least(seen.w, view.held)} : Sight{seen.x, least(seen.y, view.held)};
      }
      mask_old<S>(s, sights, view.sinks, key + first);
    }
    update<S>(state, s, plan.scale, weights);
    if (!is_fresh) {
      wait_groups(2 * depth - 2);
      tile_barrier<S>();
    }
    add_values<S>(state, weights, keys + S::kMatrix, first);
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

// One item as this worker sees it.
struct Piece {
  int64_t counter;  // of the item, times the cluster's size, plus the rank
  int first_worker, workers;
  int item_begin, share;  // in steps of the whole list
};

// Joins warps, blocks and workers; whoever is last writes o and lse.
template <class S>
__device__ __forceinline__ void merge(const Params& p, const Rows2& rows, const Target& at, const Piece& piece,
                                      int valid, bool idle, int worker, float* out, float2* statistics, int* flag) {
  const int C = cluster_size(), rank = blockIdx.x % C;
  constexpr int kFours = S::D / 4;
  float2* joined = statistics + S::kWarpsS * S::kRows;
  const auto warps = [&](int row, int column) {
    return join(
        S::kWarpsS, [&](int i) { return statistics[i * S::kRows + row]; },
        [&](int i) { return *reinterpret_cast<float4*>(out + (i * S::kRows + row) * S::kOutRow + column); });
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
  const bool alone = piece.workers == 1;
  const Partial<S> partial(p.partials, worker, worker * piece.share >= piece.item_begin);
  for (int i = mine.begin + static_cast<int>(threadIdx.x); i < mine.end; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    const Part part =
        C == 1 ? warps(row, column)
               : join(
                     C, [&](int r) { return load_remote2(remote(joined_address + row * 8, r)); },
                     [&](int r) { return load_remote4(remote(out_address + (row * S::kOutRow + column) * 4, r)); });
    if (alone) {
      finish<S>(p, at, rows, row, column, part);
    } else {
      partial.put(row, column, part);
    }
  }
  if (C > 1) {
    // others may still read this block's shared memory
    cluster_barrier();
  }
  if (alone || !arrive_last(p.counters + piece.counter, piece.workers, flag)) return;
  for (int i = mine.begin + static_cast<int>(threadIdx.x); i < mine.end; i += S::kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    const auto from = [&](int w) {
      const int other = piece.first_worker + w;
      return Partial<S>(p.partials, other, other * piece.share >= piece.item_begin);
    };
    const Part part = join(
        piece.workers, [&](int w) { return from(w).statistics(row); },
        [&](int w) { return from(w).values(row, column); });
    finish<S>(p, at, rows, row, column, part);
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
  const int R = p.H / p.HK, M = p.T * R, tiles_m = ceil_div(M, S::kRows), items_each = p.HK * tiles_m;
  const int smallest = plan.smallest * C;
  Session& session = *reinterpret_cast<Session*>(memory + Layout::kScratch + Layout::kStatistics);
  static_assert(sizeof(Session) <= Layout::kSession, "fits");
  int known = -1, total, share, each = 0;
  if (p.B == 1) {
    read_session<S>(p, 0, rows, scratch, session);
    known = 0;
    const int steps = steps_of(session, p.T, S::kKeys);
    const Shares shares = even_shares(items_each, steps, workers, smallest);
    each = shares.per_item > 0 ? shares.per_item : steps;
    total = each * items_each;
    share = shares.per_item > 0 ? shares.share : uneven_share(total, workers, smallest);
  } else {
    plan_sessions<S>(p, items_each, prefix);
    total = prefix[p.B];
    share = uneven_share(total, workers, smallest);
  }
  int now = worker * share;
  const int until = least(now + share, total);
#pragma unroll 1
  while (now < until) {
    int b = 0, before = 0;
    if (p.B > 1) {
      // the last session that begins at or before `now`
      for (int step = kMaxSessions / 2; step > 0; step /= 2) {
        if (b + step < p.B && prefix[b + step] <= now) b += step;
      }
      before = prefix[b];
      each = (prefix[b + 1] - before) / items_each;
    }
    if (b != known) {
      __syncthreads();
      read_session<S>(p, b, rows, scratch, session);
      known = b;
    }
    const int item = (now - before) / each;
    const int steps = steps_of(session, p.T, S::kKeys);
    const int item_begin = before + item * each;
    const Target at{b, item / tiles_m, item % tiles_m * S::kRows, R};
    const int valid = least(S::kRows, M - at.first_row);
    const Range piece{now - item_begin, least(until - item_begin, steps)};
    const Range part = part_of(piece, rank, C);
    now = item_begin + each;

    const int counted = counted_fresh(p.T, S::kKeys), old_count = session.old();
    Range fresh{least(part.begin, counted), least(part.end, counted)};
    if (counted == 0 && part.begin == 0 && part.end > 0) fresh = {0, ceil_div(p.T, S::kKeys)};
    const Range old{least(most(part.begin - counted, 0), old_count), least(most(part.end - counted, 0), old_count)};
    const bool idle = part.end == part.begin;
    State<S> state;
    state.clear();
    if (!idle) {
      const Hull hull = hull_of(rows, at.first_row / R, (at.first_row + valid - 1) / R);
      const Source<S> source{p, session, hull, b, at.hk};
      attend<S>(p, plan, rows, source, at, valid, fresh, old, at.first_row == 0, state, query_tile, stages);
    }
    __syncthreads();
    float* out = reinterpret_cast<float*>(query_tile);
    if (!idle) park<S>(state, valid, out, statistics);
    __syncthreads();
    const int first_worker = item_begin / share, last_worker = (item_begin + steps - 1) / share;
    const Piece of{(int64_t{b} * items_each + item) * C + rank, first_worker, last_worker - first_worker + 1,
                   item_begin, share};
    merge<S>(p, rows, at, of, valid, idle, worker, out, statistics, scratch);
    __syncthreads();
  }
}

}  // namespace sk::incremental_prefill
