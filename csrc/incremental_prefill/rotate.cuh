// Rows of q and k turned by their angles, eight neighbouring columns or one at a time: the arithmetic of rotate_append.
#pragma once

#include <cstdint>

#include "incremental_prefill/params.h"
#include "streamkernels/chunk.cuh"
#include "streamkernels/rope.cuh"

namespace sk::incremental_prefill {

template <typename Element>
__device__ __forceinline__ float angle(const void* table, int64_t at, bool fp32) {
  return fp32 ? static_cast<const float*>(table)[at] : to_float(static_cast<const Element*>(table)[at]);
}

// Two chunks of eight columns of a row, on their way from memory, with their angles; pair `c` of D / 16. Halves: the
// two are turned against each other; interleaved: each in itself. All accesses lie on 16-byte borders.
template <typename Element>
struct Pairs {
  Chunk<Element, 8> a, b;
  float cosine[8], sine[8];
  int first, second;  // columns
  bool turned;

  __device__ __forceinline__ void load(const Params& p, const Element* row, int b_, int t, int c) {
    const int half = p.rotary_dim / 2;
    turned = c * 16 < p.rotary_dim;
    const bool halves = turned && !p.interleaved;
    first = halves ? c * 8 : c * 16;
    second = first + (halves ? half : 8);
    a.load(row + first);
    b.load(row + second);
    if (!turned) return;
    const int64_t cosine_at = b_ * p.cosine.batch + t * p.cosine.row + c * 8;
    const int64_t sine_at = b_ * p.sine.batch + t * p.sine.row + c * 8;
    load_angles<Element, 8>(cosine, p.cosine.data, cosine_at, p.angles_fp32);
    load_angles<Element, 8>(sine, p.sine.data, sine_at, p.angles_fp32);
  }

  __device__ __forceinline__ void turn(bool interleaved) {
    if (!turned) return;
    float x[8], y[8];
    a.unpack(x);
    b.unpack(y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!interleaved) {
        const Pair pair = rotate_pair(x[i], y[i], cosine[i], sine[i]);
        x[i] = pair.x, y[i] = pair.y;
      } else {
        float (&z)[8] = i < 4 ? x : y;
        const Pair pair = rotate_pair(z[2 * i % 8], z[2 * i % 8 + 1], cosine[i], sine[i]);
        z[2 * i % 8] = pair.x, z[2 * i % 8 + 1] = pair.y;
      }
    }
    a.pack(x);
    b.pack(y);
  }
};

// Column `at` of row t of session b, whose elements begin at `row`, for any alignment.
template <typename Element>
__device__ __forceinline__ Element rotated_element(const Params& p, const Element* row, int b, int t, int at) {
  if (at >= p.rotary_dim) return row[at];
  const int half = p.rotary_dim / 2, step = p.interleaved ? 1 : half;
  const bool low = p.interleaved ? at % 2 == 0 : at < half;
  const int pair = p.interleaved ? at / 2 : (low ? at : at - half);
  const float own = to_float(row[at]), other = to_float(row[low ? at + step : at - step]);
  const float c = angle<Element>(p.cosine.data, b * p.cosine.batch + t * p.cosine.row + pair, p.angles_fp32);
  const float s = angle<Element>(p.sine.data, b * p.sine.batch + t * p.sine.row + pair, p.angles_fp32);
  Element out;
  from_float(low ? rotate_pair(own, other, c, s).x : rotate_pair(other, own, c, s).y, out);
  return out;
}

}  // namespace sk::incremental_prefill
