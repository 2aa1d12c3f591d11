// rotate_append: rotate the rows of k by their own angles and write k and v where the rows' roles say.
// Memory-bound: every byte of k and v is read once and written once, 16 bytes at a time where alignment allows.
#pragma once

#include "rotate_append/params.h"
#include "rotate_append/plan.h"
#include "streamkernels/columns.cuh"
#include "streamkernels/roles.cuh"
#include "streamkernels/slots.cuh"

namespace sk::rotate_append {

struct Place {
  int slot;  // kNoSlot: not written
  int segment;
};

// Place of the row that has `rank` earlier rows of its segment in this call. Exactly one row of a segment that does not
// fit reports it.
__device__ __forceinline__ Place place_of(const Params& p, int b, int segment, int rank, bool report) {
  const int64_t index = int64_t{p.length[b * p.length_batch + segment * p.length_segment]} + rank;
  const int capacity = segment == kTarget ? p.target_capacity : p.source_capacity;
  const int slot = slot_of(index, capacity, p.sinks, p.bounded);
  if (report && slot == kNoSlot && (rank == 0 || index == capacity)) atomicOr(p.status, 1 << segment);
  return {slot, segment};
}

// Fills `places` for rows [begin, begin + count) of batch row b and ends in a barrier.
__device__ __forceinline__ void find_places(const Params& p, int b, int begin, int count, bool report, Place* places) {
  const int thread = threadIdx.x, threads = blockDim.x;
  if (p.role == nullptr) {
    for (int i = thread; i < count; i += threads) places[i] = place_of(p, b, p.segment, begin + i, report);
    __syncthreads();
    return;
  }
  constexpr int kWarps = kThreads / 32;
  __shared__ Counts before[kWarps], inside[kWarps];
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const unsigned earlier_lanes = (1u << lane) - 1;
  const int8_t* role = p.role + b * p.role_batch;
  Counts earlier = count_roles(role, p.role_row, begin);  // this thread's share of the rows before `begin`
  Counts base{0, 0};                                      // rows before the strip, known to all threads
  for (int strip = 0; strip < count; strip += threads) {
    const int i = strip + thread;
    const int r = i < count ? role[(begin + i) * p.role_row] : -1;
    const unsigned sources = __ballot_sync(~0u, r == kSource), targets = __ballot_sync(~0u, r == kTarget);
    const Counts share{__reduce_add_sync(~0u, earlier.source), __reduce_add_sync(~0u, earlier.target)};
    if (lane == 0) {
      before[warp] = share;
      inside[warp] = {__popc(sources), __popc(targets)};
    }
    __syncthreads();
    Counts rank = base;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w >= warps) break;
      base.source += before[w].source + inside[w].source;
      base.target += before[w].target + inside[w].target;
      rank.source += before[w].source + (w < warp ? inside[w].source : 0);
      rank.target += before[w].target + (w < warp ? inside[w].target : 0);
    }
    if (i < count) {
      Place place{kNoSlot, kSource};
      if (r == kSource) place = place_of(p, b, r, rank.source + __popc(sources & earlier_lanes), report);
      if (r == kTarget) place = place_of(p, b, r, rank.target + __popc(targets & earlier_lanes), report);
      places[i] = place;
    }
    earlier = {0, 0};
    __syncthreads();
  }
}

// The columns of k and v of one row and head, on their way from the chunk to the cache.
template <typename Element, int N, bool INTERLEAVED>
struct Cell {
  Chunk<Element, N> k_a, k_b, v_a, v_b;

  __device__ __forceinline__ void load(const Element* k, const Element* v, const Columns<N, INTERLEAVED>& columns) {
    k_a.load_streaming(k + columns.a);
    v_a.load_streaming(v + columns.a);
    if (columns.b >= 0) {
      k_b.load_streaming(k + columns.b);
      v_b.load_streaming(v + columns.b);
    }
  }

  __device__ __forceinline__ void store(Element* k, Element* v, const Columns<N, INTERLEAVED>& columns) const {
    k_a.store(k + columns.a);
    v_a.store(v + columns.a);
    if (columns.b >= 0) {
      k_b.store(k + columns.b);
      v_b.store(v + columns.b);
    }
  }
};

// N columns in one access: 16 bytes, or one element where alignment or sizes do not allow that.
template <typename Element, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads, kBlocksThatFit)
    rotate_append_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  constexpr int kInFlight = N > 1 ? kHeadsInFlight : kScalarsInFlight;
  __shared__ Place places[kMaxTile];
  // heads vary fastest: blocks that share angles and roles run together
  const unsigned outer = blockIdx.x / plan.groups, group = blockIdx.x % plan.groups;
  const int b = outer / plan.tiles;
  const int begin = (outer % plan.tiles) * plan.rows, end = min(begin + plan.rows, p.T);
  const int first_head = group * plan.heads, last_head = min(first_head + plan.heads, p.HK);
  const int step = blockDim.x / plan.items;  // rows under way at a time
  const int row = threadIdx.x / plan.items;
  const Columns<N, INTERLEAVED> columns(threadIdx.x % plan.items, plan.items, p.D, p.rotary_dim);

  int t = row < step ? begin + row : end;
  int h = first_head;
  Angles<Element, N, INTERLEAVED> angles;
  Cell<Element, N, INTERLEAVED> cells[kInFlight];
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (h + u < last_head) cells[u].load(at<Element>(p.k, b, h + u, t), at<Element>(p.v, b, h + u, t), columns);
    }
    if (h == first_head) {
      angles.load(p.cosine.data, p.sine.data, b * p.cosine.batch + t * p.cosine.row, b * p.sine.batch + t * p.sine.row,
                  p.angles_fp32, columns);
    }
  };
  // the first loads are in flight while the places are found
  if (t < end) load();
  find_places(p, b, begin, end - begin, group == 0, places);
  while (t < end) {
    const Place place = places[t - begin];
    const bool target = place.segment == kTarget;
    if (place.slot != kNoSlot) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (h + u >= last_head) break;
        turn(cells[u].k_a, cells[u].k_b, columns, angles);
        cells[u].store(at<Element>(target ? p.target_k : p.source_k, b, h + u, place.slot),
                       at<Element>(target ? p.target_v : p.source_v, b, h + u, place.slot), columns);
      }
    }
    h += kInFlight;
    if (h >= last_head) {
      h = first_head;
      t += step;
      if (t >= end) break;
    }
    load();
  }
}

}  // namespace sk::rotate_append
