// Rows of a matrix product and their online softmax (Milakov and Gimelshein, arXiv 1805.02867), in the registers of a
// warp: scores [16, keys] and sums [16, D] as products leave them. Maxima are in units of log2(e): weights are
// 2^(s - m). A shape S says Element, D and kWarpKeys, the keys of a tile that a warp weighs.
#pragma once

#include <cmath>
#include <cstdint>

#include "streamkernels/softmax.cuh"
#if defined(__CUDACC__)
#include "streamkernels/mma.cuh"
#endif

namespace sk {

// A thread's part: rows lane / 4 and + 8, columns 2 (lane % 4) and + 1 of every eight.
template <class S>
struct State {
  float o[S::D / 8][4];
  float m[2], l[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < S::D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.f;
  }
};

// Weights may grow to 2^kSlack before o and l are rescaled: maxima rise often, but rarely by much.
constexpr float kSlack = 8.f;

// Raises the maxima to those of new scores, where they must be raised; then true, and what o must be multiplied by.
template <class S>
__device__ __forceinline__ bool raise(State<S>& state, const float (&s)[S::kWarpKeys / 8][4], float scale,
                                      float (&alpha)[2], float slack = kSlack) {
  float top[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float half[2];  // two chains take half the time of one
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 8; ++n) {
      const float both = fmaxf(s[n][2 * i], s[n][2 * i + 1]);
      half[n % 2] = n < 2 ? both : fmaxf(half[n % 2], both);
    }
    top[i] = fmaxf(half[0], half[1]);
    top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2)) * scale;
  }
  const bool must[2] = {top[0] > state.m[0] + slack, top[1] > state.m[1] + slack};
  if (!__any_sync(~0u, must[0] || must[1])) return false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    alpha[i] = 1.f;
    if (!must[i]) continue;
    alpha[i] = exp2_fast(state.m[i] - top[i]);
    state.m[i] = top[i];
    state.l[i] *= alpha[i];
  }
  return true;
}
template <class S>
__device__ __forceinline__ void rescale(State<S>& state, const float (&alpha)[2]) {
#pragma unroll
  for (int i = 0; i < S::D / 8; ++i) {
    state.o[i][0] *= alpha[0], state.o[i][1] *= alpha[0];
    state.o[i][2] *= alpha[1], state.o[i][3] *= alpha[1];
  }
}

// Turns scores into weights, and adds them to l.
template <class S>
__device__ __forceinline__ void weigh(State<S>& state, float (&s)[S::kWarpKeys / 8][4], float scale) {
  const float shift[2] = {state.m[0] == -INFINITY ? 0.f : state.m[0], state.m[1] == -INFINITY ? 0.f : state.m[1]};
#pragma unroll
  for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = exp2_fast(fmaf(s[n][j], scale, -shift[j / 2]));
    state.l[0] += s[n][0] + s[n][1];
    state.l[1] += s[n][2] + s[n][3];
  }
}
// Weights as a product's left side.
template <class S>
__device__ __forceinline__ void pack_weights(const float (&w)[S::kWarpKeys / 8][4],
                                             uint32_t (&p)[S::kWarpKeys / 16][4]) {
#pragma unroll
  for (int n = 0; n < S::kWarpKeys / 8; ++n) {
    p[n / 2][n % 2 * 2] = pack<typename S::Element>(w[n][0], w[n][1]);
    p[n / 2][n % 2 * 2 + 1] = pack<typename S::Element>(w[n][2], w[n][3]);
  }
}

}  // namespace sk
