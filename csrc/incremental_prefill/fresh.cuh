// What a call brings: its queries, rotated, and its new rows, rotated and written to where they belong in the cache.
#pragma once

#include "incremental_prefill/attend.cuh"
#include "incremental_prefill/instance.h"
#include "incremental_prefill/merge.cuh"
#include "incremental_prefill/rotate.cuh"

namespace sk::incremental_prefill {

// Row `row` of the tile among the packed queries, and its t.
template <typename Element>
__device__ __forceinline__ const Element* query_at(const Params& p, const Plan& plan, const Target& at, int row,
                                                   int& t) {
  const int m = at.first_row + row;
  t = divide_by_R(plan, m);
  const int h = at.hk * plan.R + m - t * plan.R;
  return static_cast<const Element*>(p.q.data) + at.b * p.q.batch + h * p.q.head + t * p.q.row;
}

// A negative scale turns queries around, a scale of zero makes them zero.
__device__ __forceinline__ uint4 with_sign(const Plan& plan, uint4 x) {
  if (__builtin_expect(plan.sign > 0.f, 1)) return x;
  asm volatile("// odd scale\n");
  const uint32_t keep = plan.sign == 0.f ? 0u : ~0u, flip = plan.sign < 0.f ? 0x80008000u : 0u;
  return make_uint4((x.x & keep) ^ flip, (x.y & keep) ^ flip, (x.z & keep) ^ flip, (x.w & keep) ^ flip);
}

// The rows of the tile into shared memory, rotated, element by element, for rows that do not lie on 16-byte borders.
template <class S>
__device__ __forceinline__ void load_queries_slowly(const Params& p, const Plan& plan, const Target& at, int valid,
                                                    char* tile) {
  using Element = typename S::Element;
#pragma unroll 1
  for (int i = threadIdx.x; i < valid * S::D; i += S::kThreads) {
    const int row = i / S::D, column = i % S::D;
    int t;
    const Element* q = query_at<Element>(p, plan, at, row, t);
    Element x = rotated_element(p, q, at.b, t, column);
    x.bits = static_cast<uint16_t>(with_sign(plan, make_uint4(x.bits, 0, 0, 0)).x);
    reinterpret_cast<Element*>(tile + chunk_at<S::D, S::kRows>(row, column / 8))[column % 8] = x;
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

// What a tile of queries needs of the call: the queries, and the new keys and values if the block attends to them and
// they are few. Fetched into registers before any key of the cache is asked for, and turned when they are there.
template <class S>
struct Intake {
  using Element = typename S::Element;
  using Place = typename Pairs<Element>::Place;
  static constexpr int kPairs = S::D / 16, kAll = ceil_div(S::kRows * kPairs, S::kThreads);
  // pairs of queries per thread and round, as registers allow
  static constexpr int kQueries = least(kAll, (S::kEager && S::D <= 128) ? 2 : 1), kRounds = ceil_div(kAll, kQueries);
  static constexpr bool kHoldsNew = S::kEager && S::D <= 128 && S::kRows < 128;

  Pairs<Element> queries[kQueries], held;
  int fresh;  // new rows that were fetched

  // What is worked out with it is worked out again each time, and kept in no register meanwhile.
  __device__ __forceinline__ static int own_thread() {
    int thread = threadIdx.x;
    if constexpr (S::kEager) asm volatile("" : "+r"(thread));
    return thread;
  }

  // Round `round` of the queries. What lies behind them in the tile stays as it is: no row ever reaches another one.
  __device__ __forceinline__ void fetch_queries(const Params& p, const Plan& plan, const Target& at, int valid,
                                                int round) {
    const int thread = own_thread();
#pragma unroll
    for (int u = 0; u < kQueries; ++u) {
      const int i = (round * kQueries + u) * S::kThreads + thread;
      if (!plan.wide_q || i >= valid * kPairs) continue;
      int t;
      const Element* from = query_at<Element>(p, plan, at, i / kPairs, t);
      queries[u].load(p, from, at.b, t, i % kPairs, Place(p, i % kPairs));
    }
  }
  __device__ __forceinline__ void put_queries(const Params& p, const Plan& plan, int valid, char* tile, int round) {
    const int thread = own_thread();
#pragma unroll
    for (int u = 0; u < kQueries; ++u) {
      const int i = (round * kQueries + u) * S::kThreads + thread, row = i / kPairs;
      if (!plan.wide_q || row >= valid) continue;
      const Place place(p, i % kPairs);
      queries[u].turn(p, place);
      for (const bool low : {true, false}) {
        const int column = low ? place.first : place.second;
        const uint4 x = low ? queries[u].a.bits : queries[u].b.bits;
        *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kRows>(row, column / 8)) = with_sign(plan, x);
      }
    }
  }

  // A pair of the new keys or values per thread, from the last thread on: the first ones have queries.
  __device__ __forceinline__ static int own_pair() { return S::kThreads - 1 - static_cast<int>(threadIdx.x); }

  // `new_rows`: how many of the call's rows this block attends to at once.
  __device__ __forceinline__ void fetch_new(const Params& p, const Plan& plan, const Target& at, int new_rows) {
    fresh = kHoldsNew && plan.wide_kv && 2 * new_rows * kPairs <= S::kThreads ? new_rows : 0;
    if constexpr (!kHoldsNew) return;
    const int i = own_pair(), row = i / kPairs;
    if (row >= 2 * fresh) return;
    const bool is_value = row >= fresh;
    const int t = is_value ? row - fresh : row;
    const Rows& rows = is_value ? p.v : p.k;
    const Element* from = static_cast<const Element*>(rows.data) + at.b * rows.batch + at.hk * rows.head + t * rows.row;
    held.load(p, from, at.b, t, i % kPairs, Place(p, i % kPairs, !is_value));
  }
  // Into the tile `keys`, and to where they belong in the cache if `write`.
  __device__ __forceinline__ void put_new(const Params& p, const Rows2& rows, const Target& at, bool write,
                                          char* keys) {
    if (!kHoldsNew || fresh == 0) return;
    const int i = own_pair(), row = i / kPairs;
    if (row < 2 * fresh) {
      const bool is_value = row >= fresh;
      const int t = is_value ? row - fresh : row;
      const Place place(p, i % kPairs, !is_value);
      held.turn(p, place);
      // rows that are no keys are masked as keys, but their values must not be NaN
      if (rows.code[t] == kNoKey) held.a.bits = held.b.bits = make_uint4(0, 0, 0, 0);
      char* to = keys + (is_value ? S::kMatrix : 0);
      *reinterpret_cast<uint4*>(to + chunk_at<S::D, S::kKeys>(t, place.first / 8)) = held.a.bits;
      *reinterpret_cast<uint4*>(to + chunk_at<S::D, S::kKeys>(t, place.second / 8)) = held.b.bits;
      Home<Element> home;
      if (write) home.find(p, rows, at.b, at.hk, t, at.hk == 0 && i % kPairs == 0 && !is_value);
      Element* const there = is_value ? home.v : home.k;
      if (there != nullptr) {
        *reinterpret_cast<uint4*>(there + place.first) = held.a.bits;
        *reinterpret_cast<uint4*>(there + place.second) = held.b.bits;
      }
    }
    const int behind = ceil_div(fresh, S::kWarpKeys) * S::kWarpKeys - fresh;
#pragma unroll 1
    for (int j = threadIdx.x; j < behind * S::kChunks; j += S::kThreads) {
      const int to = chunk_at<S::D, S::kKeys>(fresh + j / S::kChunks, j % S::kChunks);
      *reinterpret_cast<uint4*>(keys + S::kMatrix + to) = make_uint4(0, 0, 0, 0);
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
  for (int i = threadIdx.x; i < used * places; i += S::kThreads) {
    const int row = plan.wide_kv ? i / (S::D / 16) : i / S::D, place = i - row * places, t = first + row;
    const bool is_key = t < p.T && rows.code[t] != kNoKey;
    const Element* k = static_cast<const Element*>(p.k.data) + b * p.k.batch + hk * p.k.head + t * p.k.row;
    const Element* v = static_cast<const Element*>(p.v.data) + b * p.v.batch + hk * p.v.head + t * p.v.row;
    Home<Element> home;
    if (write && t < p.T) home.find(p, rows, b, hk, t, hk == 0 && place == 0);
    if (plan.wide_kv) {
      const typename Pairs<Element>::Place at(p, place);
      Pairs<Element> key{};
      uint4 value[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
      if (is_key) {
        key.load(p, k, b, t, place, at);
        value[0] = __ldg(reinterpret_cast<const uint4*>(v + at.first));
        value[1] = __ldg(reinterpret_cast<const uint4*>(v + at.second));
        key.turn(p, at);
      }
      const int to[2] = {chunk_at<S::D, S::kKeys>(row, at.first / 8), chunk_at<S::D, S::kKeys>(row, at.second / 8)};
      *reinterpret_cast<uint4*>(keys + to[0]) = key.a.bits;
      *reinterpret_cast<uint4*>(keys + to[1]) = key.b.bits;
      *reinterpret_cast<uint4*>(values + to[0]) = value[0];
      *reinterpret_cast<uint4*>(values + to[1]) = value[1];
      if (home.k == nullptr) continue;
      *reinterpret_cast<uint4*>(home.k + at.first) = key.a.bits;
      *reinterpret_cast<uint4*>(home.k + at.second) = key.b.bits;
      *reinterpret_cast<uint4*>(home.v + at.first) = value[0];
      *reinterpret_cast<uint4*>(home.v + at.second) = value[1];
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

}  // namespace sk::incremental_prefill
