// span_attention for few query rows: the keys of each row's spans, cut over the multiprocessors. Memory-bound: what a
// block of rows goes through is read once, kept keys are gathered by index straight into shared memory.
#pragma once

#include "span_attention/finish.cuh"
#include "span_attention/params.h"
#include "span_attention/plan.h"
#include "span_attention/share.cuh"
#include "streamkernels/async.cuh"
#include "streamkernels/mma.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::span_attention {

// Rows [first, first + 16) of the block and the keys that one warp goes through: all of a tile, or a quarter of it.
// A lane holds of each 16 x 8 matrix two rows, lane / 4 and 8 below, and two columns.
template <typename Element, int D, int KEYS>
struct Warp {
  static constexpr int kBytes = row_bytes(D);
  Part part[2];   // this lane's share of the sum
  float sunk[2];  // of it, what goes to the sink of the slot; this lane's share
  float acc[D / 8][4];

  __device__ __forceinline__ Warp() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      part[i] = {-INFINITY, 0.0f};
      sunk[i] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[d][i] = 0.0f;
    }
  }

  // q of the warp's 16 rows: in registers where there is room, else read again for every tile
  static constexpr bool kHeld = D <= 128;
  uint32_t held[kHeld ? D / 16 : 1][4];

  // shared address of this lane's row of the matrices of q
  static __device__ __forceinline__ uint32_t query_row(uint32_t q) {
    const int lane = threadIdx.x % 32;
    return q + (lane / 8 % 2 * 8 + lane % 8) * kBytes + lane / 16 * 16;
  }
  __device__ __forceinline__ void hold(uint32_t q) {
    if constexpr (kHeld) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) load_matrices(held[d], query_row(q) + d * 32);
    }
  }

  // q k of 16 rows and KEYS keys; q, k: shared addresses of their first rows. Matrices are read four at a time, ahead
  // of the products that wait for them.
  __device__ __forceinline__ void products(float (&s)[KEYS / 8][4], uint32_t q, uint32_t k) const {
    constexpr int kAhead = D / 16 % 4 == 0 ? 4 : 3;
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const uint32_t k_row = k + (matrix / 2 * 8 + row) * kBytes + matrix % 2 * 16;
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
#pragma unroll
      for (int d = 0; d < D / 16; d += kAhead) {
        uint32_t b[kAhead][4];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) load_matrices(b[u], k_row + j * 16 * kBytes + (d + u) * 32);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          uint32_t a[4];
          if constexpr (kHeld) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = held[d + u][i];
          } else {
            load_matrices(a, query_row(q) + (d + u) * 32);
          }
          multiply_add<Element>(s[2 * j], a, b[u][0], b[u][1]);
          multiply_add<Element>(s[2 * j + 1], a, b[u][2], b[u][3]);
        }
      }
    }
  }

  // Folds a tile into the sums. `keys`: its key indices, of this warp's first; `spans`: of this warp's first row.
  __device__ __forceinline__ void fold(uint32_t q, uint32_t k, uint32_t v, const int* keys,
                                       const int2 (*spans)[kMaxSlots], int n, Rule rule, const Factors& factors) {
    float s[KEYS / 8][4] = {};
    products(s, q, k);
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    const int2 upper = spans[row][n], lower = spans[row + 8][n];
    float top[2] = {part[0].top, part[1].top};
    uint32_t used = 0;  // bit 2 j + i: some of the 16 rows sees column i of the keys' matrix j
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = keys[8 * j + column + i % 2];
        const int2 span = i < 2 ? upper : lower;
        const bool sees = key >= span.x && key < span.y;
        s[j][i] = sees ? score_of(s[j][i], factors) : -INFINITY;
        used |= static_cast<uint32_t>(sees) << (2 * j + i % 2);
        top[i / 2] = fmaxf(top[i / 2], s[j][i]);
      }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(kAll, top[i], step));
    }
    float fade[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // equal also where nothing has been seen yet
      fade[i] = part[i].top == top[i] ? 1.0f : exp2f(part[i].top - top[i]);
      part[i] = {top[i], part[i].sum * fade[i]};
      sunk[i] *= fade[i];
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[j][i] = exp2f(s[j][i] - finite_top(top[i / 2]));
        part[i / 2].sum += s[j][i];
        if (rule == kSink) sunk[i / 2] += s[j][i];
      }
    }
    // mostly the largest score stays what it was
    if (__any_sync(kAll, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[d][i] *= fade[i / 2];
      }
    }
    if (rule == kAttend || rule == kKept) weigh(s, used, v);
  }

  // acc += p v. A value that none of the 16 rows sees may be NaN, and 0 * NaN is NaN: it is masked away.
  __device__ __forceinline__ void weigh(const float (&p)[KEYS / 8][4], uint32_t used, uint32_t v) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const uint32_t v_row = v + (matrix % 2 * 8 + row) * kBytes + matrix / 2 * 16;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) used |= __shfl_xor_sync(kAll, used, step);
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      const uint32_t a[4] = {pack<Element>(p[2 * j][0], p[2 * j][1]), pack<Element>(p[2 * j][2], p[2 * j][3]),
                             pack<Element>(p[2 * j + 1][0], p[2 * j + 1][1]),
                             pack<Element>(p[2 * j + 1][2], p[2 * j + 1][3])};
      const uint32_t bits = used >> (4 * j);
      const uint32_t first = (bits & 1 ? 0xffffu : 0) | (bits & 2 ? 0xffff0000u : 0);
      const uint32_t second = (bits & 4 ? 0xffffu : 0) | (bits & 8 ? 0xffff0000u : 0);
      constexpr int kAhead = D / 16 % 4 == 0 ? 4 : 3;
#pragma unroll
      for (int d = 0; d < D / 16; d += kAhead) {
        uint32_t b[kAhead][4];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) load_matrices_transposed(b[u], v_row + j * 16 * kBytes + (d + u) * 32);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          multiply_add<Element>(acc[2 * (d + u)], a, b[u][0] & first, b[u][1] & second);
          multiply_add<Element>(acc[2 * (d + u) + 1], a, b[u][2] & first, b[u][3] & second);
        }
      }
    }
  }

  // Leaves a SINK slot: its mass goes to one value, or to none when `value` is null.
  __device__ __forceinline__ void sink(const Element* value) {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) sunk[i] = sum_of_row(sunk[i]);
    if (value != nullptr) {
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        float x[2];
        unpack<Element>(*reinterpret_cast<const uint32_t*>(value + 8 * d + column), x[0], x[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[d][i] += sunk[i / 2] > 0.0f ? sunk[i / 2] * x[i % 2] : 0.0f;
      }
    }
    sunk[0] = sunk[1] = 0.0f;
  }

  static __device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
  }
};

// One tile of k, and of v where its values count, on the way to shared memory. AHEAD: indices that are read before the
// copies which wait for them.
template <typename Element, int D, int AHEAD>
__device__ __forceinline__ void fetch(const Element* k, const Element* v, int64_t k_row, int64_t v_row, const int* keys,
                                      uint32_t k_shared, uint32_t v_shared, bool values) {
  constexpr int kPieces = D / 8;
#pragma unroll AHEAD
  for (int j = 0; j < kKeys * kPieces / kThreads; ++j) {
    const int i = j * kThreads + threadIdx.x, row = i / kPieces, piece = i % kPieces, key = keys[row];
    const uint32_t at = row * row_bytes(D) + piece * 16;
    copy_async(k_shared + at, k + key * k_row + piece * 8, key >= 0);
    copy_async(v_shared + at, v + key * v_row + piece * 8, key >= 0 && values);
  }
}

// q of the block's rows to shared memory, zeros behind them
template <typename Element, int D, int ROWS>
__device__ __forceinline__ void read_queries(const Params& p, const Tile& tile, char* to) {
  constexpr int kPieces = D / 8;
  const Element* q = static_cast<const Element*>(p.q.data) + tile.b * p.q.batch;
#pragma unroll
  for (int j = 0; j < (ROWS * kPieces + kThreads - 1) / kThreads; ++j) {
    const int i = j * kThreads + threadIdx.x, row = i / kPieces, piece = i % kPieces;
    if (i >= ROWS * kPieces) break;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (row < tile.rows) {
      bits = *reinterpret_cast<const uint4*>(q + tile.head(row) * p.q.head + tile.row(row) * p.q.row + piece * 8);
    }
    *reinterpret_cast<uint4*>(to + row * row_bytes(D) + piece * 16) = bits;
  }
}

template <typename Element, int D, int ROWS>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    span_attention_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  constexpr bool kShared = ROWS == 16;  // the warps have the same rows and a quarter of the keys each
  constexpr int kWarpKeys = kShared ? kKeys / kWarps : kKeys;
  // all of a thread's copies at once, but where the sums leave no registers for their addresses
  constexpr int kAhead = D == 256 && !kShared ? 4 : 16;
  extern __shared__ __align__(16) char memory[];
  __shared__ int2 spans[ROWS][kMaxSlots];
  __shared__ int keys[kRing][kKeys];
  __shared__ Range ranges[kMaxSlots];

  const int split = blockIdx.x % plan.splits;
  const Tile tile(p, blockIdx.x / plan.splits, plan.tiles, ROWS);
  const int warp = threadIdx.x / 32, thread = threadIdx.x;
  char* queries = memory + plan.stages * stage_bytes(D);
  read_queries<Element, D, ROWS>(p, tile, queries);
  find_share<ROWS>(p, tile, split, plan.splits, spans, ranges);

  const Element* k = static_cast<const Element*>(p.k.data) + tile.b * p.k.batch + tile.hk * p.k.head;
  const Element* v = static_cast<const Element*>(p.v.data) + tile.b * p.v.batch + tile.hk * p.v.head;
  const uint32_t stages = shared_address(memory), q = shared_address(queries);
  const auto stage_of = [&](int i) { return stages + i % plan.stages * stage_bytes(D); };
  Cursor listed{0, ranges[0].begin}, fetched, folded;  // of the next tile to list, to fetch, to fold
  listed.settle(ranges, p.N);
  fetched = folded = listed;

  // indices of the first tiles, then their copies
  for (int i = 0; i < plan.stages; ++i) {
    if (thread < kKeys) keys[i % kRing][thread] = key_of(p, tile, listed, ranges, thread);
    listed.next(ranges, p.N);
  }
  __syncthreads();
  const int row0 = kShared ? 0 : 16 * warp, key0 = kShared ? kWarpKeys * warp : 0;
  Warp<Element, D, kWarpKeys> sums;
  sums.hold(q + row0 * row_bytes(D));
  // tile i is folded while the next ones are on their way; the first rounds only fetch
  for (int i = 1 - plan.stages; folded.n < p.N; ++i) {
    if (i >= 0 && plan.stages > 1) {
      if (plan.stages == 3) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
    }
    if (fetched.n < p.N) {
      const int next = i + plan.stages - 1;
      const uint32_t to = stage_of(next);
      const Rule rule = p.rules[fetched.n];
      fetch<Element, D, kAhead>(k, v, p.k.row, p.v.row, keys[next % kRing], to, to + kKeys * row_bytes(D),
                                rule == kAttend || rule == kKept);
      fetched.next(ranges, p.N);
    }
    commit_copies();
    if (i < 0) continue;
    if (plan.stages == 1) {
      wait_copies<0>();
      __syncthreads();
    }
    // asked for now, put down below: nothing waits for it
    int ahead = -1;
    if (thread < kKeys) ahead = key_of(p, tile, listed, ranges, thread);
    listed.next(ranges, p.N);

    const int n = folded.n;
    const Rule rule = p.rules[n];
    const uint32_t k_tile = stage_of(i), v_tile = k_tile + kKeys * row_bytes(D);
    if (row0 < tile.rows) {
      sums.fold(q + row0 * row_bytes(D), k_tile + key0 * row_bytes(D), v_tile + key0 * row_bytes(D),
                keys[i % kRing] + key0, spans + row0, n, rule, plan.factors);
    }
    folded.next(ranges, p.N);
    if (rule == kSink && folded.n != n) {
      const int32_t* sinks = static_cast<const int32_t*>(p.sink_key.data);
      const int key = sinks == nullptr ? -1 : sinks[tile.b * p.sink_key.batch + n * p.sink_key.row];
      sums.sink(key >= 0 && key < p.S ? v + key * p.v.row : nullptr);
    }
    if (thread < kKeys) keys[(i + plan.stages) % kRing][thread] = ahead;
    if (plan.stages == 1) __syncthreads();
  }
  let_next_launch_begin();
#pragma unroll
  for (int i = 0; i < 2; ++i) sums.part[i].sum = sums.sum_of_row(sums.part[i].sum);
  // the copies behind the last tile were empty
  wait_copies<0>();
  __syncthreads();
  if constexpr (kShared) {
    finish_shared<Element, D>(p, plan, tile, split, sums, reinterpret_cast<float*>(memory));
  } else {
    finish_own<Element, D>(p, plan, tile, split, row0, sums);
  }
}

}  // namespace sk::span_attention
