// One warp, 16 query rows, the keys of one tile: online softmax (Milakov and Gimelshein, arXiv 1805.02867) around two
// products (FlashAttention-2, arXiv 2307.08691, algorithm 1). Maxima are in units of log2(e): weights are 2^(s - m).
#pragma once

#include <cmath>
#include <cstdint>

#include "incremental_prefill/rows.cuh"
#include "incremental_prefill/tiles.cuh"

namespace sk::incremental_prefill {

// Where this lane's fragments of q, k and v begin.
template <class S>
struct Fragments {
  static constexpr int kHeld = S::kQueryInRegisters ? S::D / 16 : 1;
  Lane<S::D, S::kRows> q;
  Lane<S::D, S::kKeys> k, v;
  uint32_t query_tile;
  uint32_t row_bytes, key_bytes;  // of the warpgroup's first row and key in a panel
  uint32_t held[kHeld][4];

  __device__ __forceinline__ Fragments(uint32_t tile, int first_row, int first_key)
      : q(first_row + threadIdx.x % 16, threadIdx.x / 16 % 2),
        k(first_key + threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8, threadIdx.x / 8 % 2),
        v(first_key + threadIdx.x % 16, threadIdx.x / 16 % 2),
        query_tile(tile),
        row_bytes(first_row / 64 * 64 * 128),
        key_bytes(first_key * 128) {}

  // once the query tile is there
  __device__ __forceinline__ void read_queries() {
    if constexpr (S::kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < S::D / 16; ++i) load_matrices(held[i], q.at(query_tile, i, 0));
    }
  }
};

// s = q k^T for the warp's keys of the tile at `keys`.
template <class S>
__device__ __forceinline__ void make_scores(float (&s)[S::kWarpKeys / 8][4], const Fragments<S>& f, uint32_t keys) {
  if constexpr (S::kWgmma) {
    open_products();
    begin_scores<S, S::kWarpKeys>(s, low_word(f.query_tile + f.row_bytes, 16), low_word(keys + f.key_bytes, 16));
    finish_products();
  } else {
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
    for (int i = 0; i < S::D / 16; ++i) {
      uint32_t a[4];
      if constexpr (S::kQueryInRegisters) {
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] = f.held[i][j];
      } else {
        load_matrices(a, f.q.at(f.query_tile, i, 0));
      }
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 16; ++n) {
        uint32_t k[4];
        load_matrices(k, f.k.at(keys, i, n));
        multiply_add<typename S::Element>(s[2 * n], a, k[0], k[1]);
        multiply_add<typename S::Element>(s[2 * n + 1], a, k[2], k[3]);
      }
    }
  }
}

// o += p v
template <class S>
__device__ __forceinline__ void add_values(State<S>& state, const Fragments<S>& f,
                                           const uint32_t (&p)[S::kWarpKeys / 16][4], uint32_t values) {
  if constexpr (S::kWgmma) {
    open_products();
    begin_values<S, S::kWarpKeys>(state, p, low_word(values + f.key_bytes, S::kKeys * 128));
    finish_products();
  } else {
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < S::D / 16; ++i) {
        uint32_t v[4];
        load_matrices_transposed(v, f.v.at(values, i, n));
        multiply_add<typename S::Element>(state.o[2 * i], p[n], v[0], v[1]);
        multiply_add<typename S::Element>(state.o[2 * i + 1], p[n], v[2], v[3]);
      }
    }
  }
}

// score -> softcap * tanh(score / softcap), in units of log2(e)
template <class S>
__device__ __forceinline__ void cap_scores(float (&s)[S::kWarpKeys / 8][4], float inner, float outer) {
  // tanh(x) = 1 - 2 / (1 + e^(2x)), exact at both ends
  const float twice = inner * 2.885390081777927f;
#pragma unroll
  for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = outer - __fdividef(2.f * outer, 1.f + exp2_fast(s[n][j] * twice));
  }
}

// Folds scores into (m, l), rescales o if it must, and leaves the weights.
template <class S>
__device__ __forceinline__ void update(State<S>& state, float (&s)[S::kWarpKeys / 8][4], float scale,
                                       uint32_t (&p)[S::kWarpKeys / 16][4]) {
  float alpha[2];
  // with it ptxas needs a register less, which sm_80 has not at D = 256
  if constexpr (!SK_WGMMA) alpha[0] = alpha[1] = 1.f;
  if (raise<S>(state, s, scale, alpha)) rescale<S>(state, alpha);
  weigh<S>(state, s, scale);
  pack_weights<S>(s, p);
}

// Hides what the two rows of this thread do not see of one segment: keys [first, + kWarpKeys) by stream index.
template <class S>
__device__ __forceinline__ void mask_old(float (&s)[S::kWarpKeys / 8][4], const Sight (&sights)[2], int sinks,
                                         int first) {
  const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!sees(sights[j / 2], sinks, column + 8 * n + j % 2)) s[n][j] = -INFINITY;
    }
  }
}

// The same for rows [first, + kWarpKeys) of the call itself, where every row sees those before it; `t`: the thread's
// two rows.
template <class S>
__device__ __forceinline__ void mask_causal(float (&s)[S::kWarpKeys / 8][4], const int (&t)[2], int first) {
  const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + 8 * n + j % 2 > t[j / 2]) s[n][j] = -INFINITY;
    }
  }
}

// The same for any rows of the call.
template <class S>
__device__ __forceinline__ void mask_fresh(float (&s)[S::kWarpKeys / 8][4], const Rows2& rows, const int (&t)[2],
                                           const View (&views)[2], int T, int first) {
  const int4 sights[2] = {rows.sights[t[0]], rows.sights[t[1]]};
  // a loop and a bit for each key: unrolled, it would be a tenth of the kernel
  static_assert(S::kWarpKeys <= 128, "two bits for every eight keys");
  uint32_t hidden[2] = {0, 0};
  int key = first + threadIdx.x % 4 * 2;
#pragma unroll 1
  for (int bit = 0; bit < S::kWarpKeys / 4; ++bit) {
    const int code = key < T ? rows.code[key] : kNoKey;
    const int index = index_of(code);
    const bool target = segment_of(code) == kTarget;
    const int sinks = target ? views[1].sinks : views[0].sinks;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Sight sight = target ? Sight{sights[i].z, sights[i].w} : Sight{sights[i].x, sights[i].y};
      if (code == kNoKey || !sees(sight, sinks, index)) hidden[i] |= 1u << bit;
    }
    key += bit % 2 == 0 ? 1 : 7;
  }
#pragma unroll
  for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (hidden[j / 2] >> (2 * n + j % 2) & 1) s[n][j] = -INFINITY;
    }
  }
}

}  // namespace sk::incremental_prefill
