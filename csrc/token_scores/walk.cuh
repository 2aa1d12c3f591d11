// A warp's walk over the heads of a tile of keys: fp16 and bf16 rows, three sums per key, all of them from products.
//
// A product has the 8 rows of one kv head of 8 keys, each as two rows of half the columns, with up to 8 query heads;
// the rows of v with their outputs, and with themselves, whose diagonal is |v|^2. Columns may be summed in any order,
// so the 16 bytes of a row that a lane copies are its own operand as they are: nothing moves between lanes.
#pragma once

#include "token_scores/plan.h"
#include "token_scores/scores.cuh"
#if defined(__CUDACC__)
#include "streamkernels/async.cuh"
#include "streamkernels/mma.cuh"
#endif

namespace sk::token_scores {

#if defined(__CUDACC__)
__device__ __forceinline__ uint4* dynamic_memory() {
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<uint4*>(memory);
}
#endif

struct TileSums {
  float along, own, mass;  // d, n, a
};

// 16 bytes to shared memory, or zeros if not `really`.
template <typename Element>
__device__ __forceinline__ void copy_elements(uint4* to, const Element* from, bool really) {
  Piece<Element> piece;
  clear(piece);
  if (really) load_elements(piece, from);
  *to = piece.bits;
}

// A lane's 16 bytes of a row are an operand as they are: their first and third 4 bytes are row lane / 4 of a product,
// the second and fourth are row lane / 4 + 8. The other operand has the first and third, or the second and fourth, of 8
// query rows, so that of two such products the upper half of one and the lower half of the other count.
// sum += them; `x` in the order first, third, second, fourth. Products cut off what they sum, and do not round it (Fasi
// et al. 2021, "Numerical behavior of NVIDIA tensor cores"): those that follow each other are added here.
template <typename Element>
__device__ __forceinline__ void fold(float (&sum)[2], const uint4& rows, const uint4& x) {
  float upper[4] = {}, lower[4] = {};
  multiply_add<Element>(upper, {rows.x, rows.y, rows.z, rows.w}, x.x, x.y);
  multiply_add<Element>(lower, {rows.x, rows.y, rows.z, rows.w}, x.z, x.w);
#pragma unroll
  for (int c = 0; c < 2; ++c) sum[c] += upper[c] + lower[2 + c];
}

// The same for products of q and k. An error of a score is a relative error of its probability: half a unit in the last
// place of a score of 4 to 8 is two of a probability. So a score keeps what its sums lose: each product is taken a
// second time, from how far the first has moved the sum, and leaves what the first cut off.
struct Score {
  float upper[4] = {}, lower[4] = {}, lost[2] = {};

  template <typename Element>
  __device__ __forceinline__ void fold(const uint4& rows, const uint4& x) {
    const uint32_t both[4] = {rows.x, rows.y, rows.z, rows.w};
    float upper_rest[4] = {upper[0], upper[1], 0.0f, 0.0f}, lower_rest[4] = {0.0f, 0.0f, lower[2], lower[3]};
    multiply_add<Element>(upper, both, x.x, x.y);
    multiply_add<Element>(lower, both, x.z, x.w);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      upper_rest[c] -= upper[c];
      lower_rest[2 + c] -= lower[2 + c];
    }
    multiply_add<Element>(upper_rest, both, x.x, x.y);
    multiply_add<Element>(lower_rest, both, x.z, x.w);
#pragma unroll
    for (int c = 0; c < 2; ++c) lost[c] += upper_rest[c] + lower_rest[2 + c];
  }

  // the sum of query head c of two, and what it has lost
  __device__ __forceinline__ float sum(int c, float& rest) const {
    const float x = upper[c], y = lower[2 + c], whole = x + y, moved = whole - x;
    rest = lost[c] + ((x - (whole - moved)) + (y - moved));
    return whole;
  }
};

__device__ __forceinline__ uint4 reordered(const uint4& x) {
  return make_uint4(x.x, x.z, x.y, x.w);
}

// The query rows, their outputs and lse in shared memory.
template <typename Element, int STEPS>
struct Queries {
  static constexpr int kRow = tile_row_bytes(STEPS) / 16;  // in units of 16 bytes
  static constexpr int kPieces = STEPS * kTileColumns / 8;
  uint4* q;
  uint4* o;
  float* lse;

  __device__ __forceinline__ Queries(uint4* memory, int H)
      : q(memory), o(memory + H * kRow), lse(reinterpret_cast<float*>(memory + 2 * H * kRow)) {}

  __device__ __forceinline__ void copy(const Params& p, int b, bool vectors) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.H * kPieces; i += blockDim.x) {
      const int head = i / kPieces, piece = i % kPieces, place = head * kRow + piece;
      const bool real = piece * 8 < p.D;
      const Element* from_q = head_of<Element>(p.q, b, head) + piece * 8;
      const Element* from_o = head_of<Element>(p.o, b, head) + piece * 8;
      if (vectors) {
        copy_or_clear_async(shared_address(q + place), from_q, real);
        copy_or_clear_async(shared_address(o + place), from_o, real);
      } else {
        copy_elements(q + place, from_q, real);
        copy_elements(o + place, from_o, real);
      }
    }
    commit_copies();
    for (int head = threadIdx.x; head < p.H; head += blockDim.x) lse[head] = lse_of(p, b, head);
  }

  // puts what this thread has copied in the order of an operand; o o of it
  __device__ __forceinline__ float reorder(const Params& p) const {
    float sum = 0.0f;
#pragma unroll 2
    for (int i = threadIdx.x; i < p.H * kPieces; i += blockDim.x) {
      const int place = i / kPieces * kRow + i % kPieces;
      q[place] = reordered(q[place]);
      Piece<Element> piece;
      piece.bits = o[place];
      o[place] = reordered(piece.bits);
      float x[8];
      piece.unpack(x);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(x[j], x[j], sum);
    }
    return sum;
  }
};

// Where a warp is: the first of two kv heads, and the first of up to 8 query heads of each.
struct Stage {
  int h, r;

  __device__ __forceinline__ Stage next(int parts, int R) const {
    return r + kTileQueries < R ? Stage{h, r + kTileQueries} : Stage{h + kTileHeads * parts, 0};
  }
};

// A warp's walk over the heads of one tile of keys. Its rows of k and v are copied to shared memory, where every lane
// reads what it has copied itself.
template <typename Element, int STEPS>
struct Walk {
  using Rows = Queries<Element, STEPS>;
  const Params& p;
  const TilePlan& plan;
  const Rows& rows;
  uint4* const own;
  const int row, corner;  // the row of 8, and the columns, that are this lane's in every operand
  const int b, R;
  // of the tile whose rows are copied next
  bool listed;
  const Element *k, *v;

  __device__ __forceinline__ Walk(const Params& params, const TilePlan& made, const Rows& queries, uint4* memory,
                                  int batch, int token)
      : p(params),
        plan(made),
        rows(queries),
        own(memory + threadIdx.x % 32),
        row(threadIdx.x % 32 / 4),
        corner(threadIdx.x % 4),
        b(batch),
        R(params.H / params.HK) {
    enter(token);
  }

  __device__ __forceinline__ void enter(int token) {
    listed = token >= 0;
    const int64_t key = max(token, 0);
    k = static_cast<const Element*>(p.k.data) + b * p.k.batch + key * p.k.row + 8 * corner;
    v = static_cast<const Element*>(p.v.data) + b * p.v.batch + key * p.v.row + 8 * corner;
  }

  __device__ __forceinline__ uint4* at(int tensor, int head, int step) const {
    return own + ((tensor * kTileHeads + head) * STEPS + step) * 32;
  }

  // begins to copy the rows of two kv heads from `h` on
  __device__ __forceinline__ void copy(int tensor, const Element* x, int64_t head_stride, int h) const {
#pragma unroll
    for (int i = 0; i < kTileHeads; ++i) {
      const Element* from = x + min(h + i, p.HK - 1) * head_stride;
      const bool real = listed && h + i < p.HK;
      if (STEPS < kAnySteps || plan.vectors) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
          // D is more than half of what there is room for
          const bool whole = STEPS > 2 && STEPS < kAnySteps && j < STEPS / 2;
          copy_or_clear_async(shared_address(at(tensor, i, j)), from + j * kTileColumns,
                              real && (whole || j * kTileColumns + 8 * corner < p.D));
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < STEPS; ++j) {
          copy_elements(at(tensor, i, j), from + j * kTileColumns, real && j * kTileColumns + 8 * corner < p.D);
        }
      }
    }
    commit_copies();
  }

  // begins to copy the first rows of a warp with this part of the heads
  __device__ __forceinline__ void begin(int part) const {
    copy(0, k, p.k.head, kTileHeads * part);
    copy(1, v, p.v.head, kTileHeads * part);
  }

  // The sums, after begin(). At the end, begins the walk over the tile of `next_token` if there are `more`.
  __device__ __forceinline__ TileSums sums(int part, int next_token, bool more) {
    TileSums sums{0.0f, 0.0f, 0.0f};
    for (Stage stage{kTileHeads * part, 0}; stage.h < p.HK;) {
      __syncwarp();
      const Stage next = stage.next(plan.parts, R);
      const bool last = next.h >= p.HK, read = last ? more : next.h != stage.h;
      if (last) enter(next_token);
      const int next_h = last ? kTileHeads * part : next.h;
      // query heads that are not there count for nothing below: any that are will do
      const int first = (stage.h * R + min(stage.r + row, R - 1)) * Rows::kRow + corner;
      const int second = stage.h + 1 < p.HK ? first + R * Rows::kRow : first;
      Score s[kTileHeads];
      float d[kTileHeads][2] = {}, squares[kTileHeads][2] = {};
      wait_copies<1>();
#pragma unroll 1
      for (int j = 0; j < STEPS; ++j) {
#pragma unroll
        for (int i = 0; i < kTileHeads; ++i)
          s[i].template fold<Element>(*at(0, i, j), rows.q[(i ? second : first) + 4 * j]);
      }
      if (read) {
        copy(0, k, p.k.head, next_h);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
#pragma unroll 1
      for (int j = 0; j < STEPS; ++j) {
#pragma unroll
        for (int i = 0; i < kTileHeads; ++i) {
          const uint4 x = *at(1, i, j);
          fold<Element>(d[i], x, rows.o[(i ? second : first) + 4 * j]);
          // the rows times themselves, whose diagonal counts
          fold<Element>(squares[i], x, reordered(x));
        }
      }
      if (read) copy(1, v, p.v.head, next_h);
      add(sums, stage, s, d, squares);
      stage = next;
    }
    return sums;
  }

  // the shares of two query heads of each kv head
  __device__ __forceinline__ void add(TileSums& sums, const Stage& stage, const Score (&s)[kTileHeads],
                                      const float (&d)[kTileHeads][2], const float (&squares)[kTileHeads][2]) const {
    float score[kTileHeads][2], rest[kTileHeads][2];
#pragma unroll
    for (int i = 0; i < kTileHeads; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float lost;
        const float sum = s[i].sum(c, lost);
        score[i][c] = sum * plan.inside;
        rest[i][c] = fmaf(lost, plan.inside, fmaf(sum, plan.inside, -score[i][c]));
      }
    }
    if (p.softcap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kTileHeads; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          // what a sum that is no number has lost is none either
          const float whole = score[i][c] + (fabsf(rest[i][c]) < 1.0f ? rest[i][c] : 0.0f);
          score[i][c] = p.softcap * tanhf(whole);
          rest[i][c] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTileHeads; ++i) {
      const bool head = stage.h + i < p.HK;
      const float square = __shfl_sync(kAll, row % 2 ? squares[i][1] : squares[i][0], 4 * row + row / 2);
      float weight = 0.0f;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int r = stage.r + 2 * corner + c;
        const bool real = head && r < R;
        const float a = probability(score[i][c], rest[i][c], rows.lse[real ? (stage.h + i) * R + r : 0]);
        if (real) {
          weight = fmaf(a, a, weight);
          sums.along = fmaf(a, d[i][c], sums.along);
          sums.mass += a;
        }
      }
      if (head) sums.own = fmaf(weight, square, sums.own);
    }
  }
};

}  // namespace sk::token_scores
