// What both kernels of token_scores make of their sums, and the parts of them that do not depend on how keys are read.
#pragma once

#include "streamkernels/chunk.cuh"
#include "token_scores/params.h"

namespace sk::token_scores {

constexpr unsigned kAll = 0xffffffffu;
// |o - c| below this many ulps of |o| is rounding of exp(s - lse), not a direction (reference/token_scores.py)
constexpr float kRounding = 64.0f * 1.1920929e-7f;

struct Scores {
  float cosine, norm, mass;
};

// of e e and e o over all heads, e = o - a v; `whole` is o o
SK_HOST_DEVICE float cosine_of(float left, float along, float whole) {
  const float length = sqrtf(whole), rest = sqrtf(left);
  float cosine = along / (rest * length);
  // written so that NaN stays
  cosine = cosine > 1.0f ? 1.0f : cosine < -1.0f ? -1.0f : cosine;
  if (rest <= kRounding * length) cosine = 0.0f;
  if (length == 0.0f) cosine = 1.0f;
  return cosine;
}

// of d = o . c and n = |c|^2, the sums over all heads; `left` is |o - c|^2 = |o|^2 - 2 d + n. The sine's square is
// (n - d^2 / |o|^2) / |o - c|^2. Where it is small its rounding is less than the cosine's, which (|o|^2 - d) would
// round three times more.
SK_HOST_DEVICE float cosine_of_sums(float along, float own, float left, float whole) {
  const float sine = fmaf(-along, along / whole, own) / left;
  if (along < whole && sine < 0.5f) return min(sqrtf(1.0f - sine), 1.0f);
  return cosine_of(left, whole - along, whole);
}

template <typename Element>
using Piece = Chunk<Element, 16 / sizeof(Element)>;

template <typename Element>
__device__ __forceinline__ void clear(Piece<Element>& piece) {
  piece.bits = uint4{0, 0, 0, 0};
}

// 16 bytes of a row that may lie anywhere.
template <typename Element>
__device__ __forceinline__ void load_elements(Piece<Element>& piece, const Element* from) {
  constexpr int kWidth = 16 / sizeof(Element);
  Element x[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = from[i];
  memcpy(&piece.bits, x, sizeof(piece.bits));
}

template <typename Element>
__device__ __forceinline__ const Element* head_of(const Table& x, int64_t b, int64_t h) {
  return static_cast<const Element*>(x.data) + b * x.batch + h * x.row;
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// exp(score + rest - lse) with what the difference loses to rounding, which is most of the error where lse is large
__device__ __forceinline__ float probability(float score, float rest, float lse) {
  const float x = score - lse, y = x - score;
  const float lost = (score - (x - y)) - (lse + y) + rest;
  const float a = expf(x);
  // not where one of them is no number
  return fabsf(lost) < 1.0f ? fmaf(a, lost, a) : a;
}
// of the product s of q and k
__device__ __forceinline__ float probability(const Params& p, float s, float lse) {
  const float score = s * p.scale;
  if (p.softcap > 0.0f) return probability(p.softcap * tanhf(score / p.softcap), 0.0f, lse);
  return probability(score, fmaf(s, p.scale, -score), lse);
}

// a row that saw nothing gave no key a probability
__device__ __forceinline__ float lse_of(const Params& p, int64_t b, int64_t head) {
  const float lse = *head_of<float>(p.lse, b, head);
  return lse == -INFINITY ? INFINITY : lse;
}

// The list of batch row b.
struct List {
  const int32_t* index;
  int64_t stride;
  int count, K, S;

  __device__ __forceinline__ List(const Params& p, int b)
      : index(static_cast<const int32_t*>(p.index.data) + b * p.index.batch),
        stride(p.index.row),
        count(min(static_cast<const int32_t*>(p.count.data)[b * p.count.batch], p.K)),
        K(p.K),
        S(p.S) {}

  // -1 for what is to be ignored; the read does not wait for the count
  __device__ __forceinline__ int operator[](int64_t entry) const {
    const int token = entry < K ? index[entry * stride] : -1;
    return entry < count && token < S ? token : -1;
  }
};

// o o over all heads of batch row b: this thread's share.
template <typename Element>
__device__ __forceinline__ float square_of_output(const Params& p, int b, bool vectors) {
  constexpr int kWidth = 16 / sizeof(Element);
  const int pieces = p.D / kWidth;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < p.H * pieces; i += blockDim.x) {
    const Element* from = head_of<Element>(p.o, b, i / pieces) + i % pieces * kWidth;
    Piece<Element> piece;
    if (vectors) {
      piece.load(from);
    } else {
      load_elements(piece, from);
    }
    float x[kWidth];
    piece.unpack(x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = fmaf(x[j], x[j], sum);
  }
  return sum;
}

}  // namespace sk::token_scores
