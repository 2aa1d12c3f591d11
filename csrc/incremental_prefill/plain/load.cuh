// The tiles of a block of a plain session, and how they get into shared memory.
#pragma once

#include "incremental_prefill/plain/barrier.cuh"
#include "incremental_prefill/plain/intake.cuh"

namespace sk::incremental_prefill {

#if SK_WGMMA

// Where a tile is, or goes: a stage, and the parity of its barriers.
struct Turn {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int by, int stages) {
    stage += by;
    while (stage >= stages) stage -= stages, phase ^= 1;
  }
};

// Bytes before the barriers of a stage's keys; those of its values follow.
template <class S>
__device__ __forceinline__ uint32_t full(uint32_t base, const Turn& at) {
  return base + PlainLayout<S>::kFull + 16 * at.stage;
}
template <class S>
__device__ __forceinline__ uint32_t empty(uint32_t base, const Turn& at) {
  return base + PlainLayout<S>::kEmpty + 16 * at.stage;
}

// The loaders' part: old tiles, then the new rows.
template <class S>
struct Loading {
  using Element = typename S::Element;
  using Layout = PlainLayout<S>;
  static constexpr int kStep = S::kLoaders / S::kChunks, kCopies = S::kKeys / kStep;
  static_assert(S::kLoaders % S::kChunks == 0 && (kStep % 8 == 0 || 8 % kStep == 0), "a thread stays in its column");

  const Params& p;
  const Plan& plan;
  const Walk& walk;
  int hk;
  uint32_t base;
  Turn at{0, 1};  // every stage is empty at first

  __device__ __forceinline__ void load(int j) {
    const int thread = threadIdx.x - S::kReaders, row = thread / S::kChunks, chunk = thread % S::kChunks;
    const uint32_t place = chunk_at<S::D, S::kKeys>(row, chunk);
    const Segment& s = p.segments[walk.is_target(j)];
    const int first = walk.first_key(j, S::kKeys) + row, left = walk.left(j, S::kKeys) - row;
#pragma unroll
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Rows& rows = matrix ? s.v : s.k;
      const Element* from = static_cast<const Element*>(rows.data) + hk * rows.head + first * rows.row + chunk * 8;
      const uint32_t to = base + Layout::kStages + at.stage * S::kStage + matrix * S::kMatrix + place;
      barrier_wait(empty<S>(base, at) + 8 * matrix, at.phase);
#pragma unroll
      for (int u = 0; u < kCopies; ++u) {
        // rows behind the last key become zeros: what they hold may be NaN
        copy_async<true>((to ^ (u * kStep % 8 * 16)) + u * kStep * 128, from + u * kStep * rows.row, u * kStep < left,
                         plan.keep);
      }
      barrier_arrive_behind_copies(full<S>(base, at) + 8 * matrix);
    }
    at.advance(1, plan.stages);
  }
  __device__ __forceinline__ void put(NewRows<S>& fresh, bool write, char* stages) {
    char* const tile = stages + at.stage * S::kStage;
    barrier_wait(empty<S>(base, at), at.phase);
    fresh.put_keys(p, hk, walk.length, write, tile);
    // who sees these keys sees all values before them, as with every other tile
    asm volatile("cp.async.wait_all;\n" ::: "memory");
    publish();
    barrier_arrive(full<S>(base, at));
    // not before: the place of the values may be given back by those who wait for the keys
    barrier_wait(empty<S>(base, at) + 8, at.phase);
    fresh.put_values(p, hk, walk.length, write, tile + S::kMatrix);
    publish();
    barrier_arrive(full<S>(base, at) + 8);
    at.advance(1, plan.stages);
  }
};

#endif

}  // namespace sk::incremental_prefill
