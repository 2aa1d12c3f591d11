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

// Columns [8 chunk, + 8) of row t of session b, whose elements begin at `row`; all accesses lie on 16-byte borders.
template <typename Element>
__device__ __forceinline__ uint4 rotated_chunk(const Params& p, const Element* row, int b, int t, int chunk) {
  const int column = chunk * 8, rotary_dim = p.rotary_dim, half = rotary_dim / 2;
  if (column >= rotary_dim) return __ldg(reinterpret_cast<const uint4*>(row + column));
  const int64_t cosine = b * p.cosine.batch + t * p.cosine.row, sine = b * p.sine.batch + t * p.sine.row;
  float out[8];
  if (!p.interleaved) {
    const bool low = column < half;
    const int partner = low ? column + half : column - half, first = low ? column : column - half;
    Chunk<Element, 8> own, other;
    own.load(row + column);
    other.load(row + partner);
    float x[8], y[8], c[8], s[8];
    load_angles<Element, 8>(c, p.cosine.data, cosine + first, p.angles_fp32);
    load_angles<Element, 8>(s, p.sine.data, sine + first, p.angles_fp32);
    own.unpack(x);
    other.unpack(y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Pair turned = low ? rotate_pair(x[i], y[i], c[i], s[i]) : rotate_pair(y[i], x[i], c[i], s[i]);
      out[i] = low ? turned.x : turned.y;
    }
  } else {
    Chunk<Element, 8> own;
    own.load(row + column);
    float x[8], c[4], s[4];
    load_angles<Element, 4>(c, p.cosine.data, cosine + column / 2, p.angles_fp32);
    load_angles<Element, 4>(s, p.sine.data, sine + column / 2, p.angles_fp32);
    own.unpack(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair turned = rotate_pair(x[2 * i], x[2 * i + 1], c[i], s[i]);
      out[2 * i] = turned.x;
      out[2 * i + 1] = turned.y;
    }
  }
  Chunk<Element, 8> packed;
  packed.pack(out);
  return packed.bits;
}

// Column `at` of the same row, for any alignment.
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
