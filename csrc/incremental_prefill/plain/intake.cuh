// What a call brings to a plain session, asked for before lengths are known: queries for those who attend, new rows for
// those who load.
#pragma once

#include "incremental_prefill/fresh.cuh"
#include "incremental_prefill/plain/shape.cuh"

namespace sk::incremental_prefill {

// The rows of a tile, turned, in shared memory: all pairs of a thread at once.
template <class S>
struct Queries {
  using Element = typename S::Element;
  using Place = typename Pairs<Element>::Place;
  static constexpr int kPairs = S::D / 16, kHeld = ceil_div(S::kRows * kPairs, S::kReaders);

  Pairs<Element> pairs[kHeld];
  const Element* row[kHeld];
  int64_t angles[kHeld][2];

  static_assert(S::kReaders % kPairs == 0, "a thread's pairs lie in the same columns");

  // Where they lie; before the launch before is complete.
  __device__ __forceinline__ void aim(const Params& p, const Plan& plan, const Target& at, int valid) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int i = least((u * S::kReaders + static_cast<int>(threadIdx.x)) / kPairs, valid - 1);
      int t;
      row[u] = query_at<Element>(p, plan, at, i, t);
      angles[u][0] = t * p.cosine.row + threadIdx.x % kPairs * 8;
      angles[u][1] = t * p.sine.row + threadIdx.x % kPairs * 8;
      asm volatile("" : "+l"(row[u]), "+l"(angles[u][0]), "+l"(angles[u][1]));
    }
  }
  __device__ __forceinline__ void fetch(const Params& p, int valid) {
    const Place place(p, threadIdx.x % kPairs);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if ((u * S::kReaders + static_cast<int>(threadIdx.x)) / kPairs < valid) {
        pairs[u].load(p, row[u], angles[u][0], angles[u][1], place);
      }
    }
  }
  // Rows behind the valid ones become zeros: they never reach another row, but the warp asks about the sums of all its
  // rows.
  __device__ __forceinline__ void put(const Params& p, const Plan& plan, int valid, char* tile) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int i = u * S::kReaders + threadIdx.x, row = i / kPairs;
      if (row >= S::kRows) continue;
      const Place place(p, i % kPairs);
      uint4 bits[2] = {};
      if (row < valid) {
        pairs[u].template turn<true>(p, place);
        bits[0] = with_sign(plan, pairs[u].a.bits), bits[1] = with_sign(plan, pairs[u].b.bits);
      }
      *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kRows>(row, place.first / 8)) = bits[0];
      *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kRows>(row, place.second / 8)) = bits[1];
    }
  }
};

// The call's own rows as a tile of keys and values, at most kKeys of them, and to where they belong in the cache.
template <class S>
struct NewRows {
  using Element = typename S::Element;
  using Place = typename Pairs<Element>::Place;
  static constexpr int kPairs = S::D / 16, kRound = S::kLoaders / kPairs;  // rows at once
  static constexpr int kHeld = least(2, S::kKeys / kRound);                // rounds that wait in registers

  Pairs<Element> keys[kHeld];
  uint4 values[kHeld][2];
  // of the first rounds
  const Element *key_rows[kHeld], *value_rows[kHeld];
  int64_t angles[kHeld][2];

  __device__ __forceinline__ static int thread() { return threadIdx.x - S::kReaders; }

  __device__ __forceinline__ static const Element* row_of(const Rows& rows, int hk, int t) {
    return static_cast<const Element*>(rows.data) + hk * rows.head + t * rows.row;
  }
  __device__ __forceinline__ void fetch_keys(const Params& p, int hk, int round, int u) {
    const int t = round * kRound + thread() / kPairs;
    if (t < p.T) keys[u].load(p, row_of(p.k, hk, t), 0, t, thread() % kPairs, Place(p, thread() % kPairs));
  }
  __device__ __forceinline__ void fetch_values(const Params& p, int hk, int round, int u) {
    const int t = round * kRound + thread() / kPairs;
    if (t >= p.T) return;
    const Element* v = row_of(p.v, hk, t);
#pragma unroll
    for (int i = 0; i < 2; ++i) values[u][i] = __ldg(reinterpret_cast<const uint4*>(v + column(p, i)));
  }
  // Where the first rounds' rows lie; before the launch before is complete.
  __device__ __forceinline__ void aim(const Params& p, int hk) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int t = u * kRound + thread() / kPairs, c = thread() % kPairs * 8;
      key_rows[u] = row_of(p.k, hk, t), value_rows[u] = row_of(p.v, hk, t);
      angles[u][0] = t * p.cosine.row + c, angles[u][1] = t * p.sine.row + c;
      asm volatile("" : "+l"(key_rows[u]), "+l"(value_rows[u]), "+l"(angles[u][0]), "+l"(angles[u][1]));
    }
  }
  __device__ __forceinline__ void fetch(const Params& p) {
    const Place place(p, thread() % kPairs);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (u * kRound + thread() / kPairs >= p.T) continue;
      keys[u].load(p, key_rows[u], angles[u][0], angles[u][1], place);
      values[u][0] = __ldg(reinterpret_cast<const uint4*>(value_rows[u] + place.first));
      values[u][1] = __ldg(reinterpret_cast<const uint4*>(value_rows[u] + place.second));
    }
  }
  // The first column of either chunk of this thread's pair.
  __device__ __forceinline__ static int column(const Params& p, int i) {
    const Place place(p, thread() % kPairs);
    return i ? place.second : place.first;
  }
  // Where row t of the new ones belongs in a segment's keys or values; null if nowhere.
  __device__ __forceinline__ static Element* home(const Rows& rows, int capacity, int hk, int index) {
    return index < 0 || index >= capacity ? nullptr : const_cast<Element*>(row_of(rows, hk, index));
  }

  // Into the tile, and to the cache if `write`, of which no other block reads these rows. `length`: of their segment.
  __device__ __forceinline__ void put_keys(const Params& p, int hk, int round, int u, int length, bool write,
                                           char* tile) {
    const int t = round * kRound + thread() / kPairs;
    if (t >= p.T) return;
    keys[u].template turn<true>(p, Place(p, thread() % kPairs));
    const Segment& s = p.segments[p.segment];
    Element* const to = write ? home(s.k, s.capacity, hk, length + t) : nullptr;
    if (write && to == nullptr && hk == 0 && thread() % kPairs == 0) atomicOr(p.status, 1 << p.segment);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 bits = i ? keys[u].b.bits : keys[u].a.bits;
      *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kKeys>(t, column(p, i) / 8)) = bits;
      if (to != nullptr) *reinterpret_cast<uint4*>(to + column(p, i)) = bits;
    }
  }
  __device__ __forceinline__ void put_values(const Params& p, int hk, int round, int u, int length, bool write,
                                             char* tile) {
    const int t = round * kRound + thread() / kPairs;
    const Segment& s = p.segments[p.segment];
    Element* const to = write && t < p.T ? home(s.v, s.capacity, hk, length + t) : nullptr;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // what is no key is masked as one, but its values must not be NaN
      const bool is_key = t < p.T && length + t >= 0;
      const uint4 bits = is_key ? values[u][i] : make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(tile + chunk_at<S::D, S::kKeys>(t, column(p, i) / 8)) = bits;
      if (to != nullptr) *reinterpret_cast<uint4*>(to + column(p, i)) = bits;
    }
  }
  __device__ __forceinline__ void put_keys(const Params& p, int hk, int length, bool write, char* tile) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) put_keys(p, hk, u, u, length, write, tile);
#pragma unroll 1
    for (int round = kHeld; round * kRound < p.T; ++round) {
      fetch_keys(p, hk, round, 0);
      put_keys(p, hk, round, 0, length, write, tile);
    }
  }
  __device__ __forceinline__ void put_values(const Params& p, int hk, int length, bool write, char* tile) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) put_values(p, hk, u, u, length, write, tile);
#pragma unroll 1
    for (int round = kHeld; round * kRound < S::kKeys; ++round) {
      fetch_values(p, hk, round, 0);
      put_values(p, hk, round, 0, length, write, tile);
    }
  }
};

}  // namespace sk::incremental_prefill
