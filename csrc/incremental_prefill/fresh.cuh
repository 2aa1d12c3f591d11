// What a call brings: its queries, rotated, and its new rows, rotated and written to where they belong in the cache.
#pragma once

#include "incremental_prefill/attend.cuh"
#include "incremental_prefill/instance.h"
#include "incremental_prefill/merge.cuh"
#include "incremental_prefill/rotate.cuh"

namespace sk::incremental_prefill {

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
    constexpr int kPairs = S::D / 16, kInFlight = S::kWgmma && S::D <= 128 ? 2 : 1;
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

}  // namespace sk::incremental_prefill
