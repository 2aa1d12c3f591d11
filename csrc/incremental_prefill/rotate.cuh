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

// Eight angles as they lie in memory: unpacked when they are used, so that no load waits for another one.
template <typename Element>
struct Angles {
  uint4 bits[2];  // the second one of fp32 alone

  __device__ __forceinline__ void load(const void* table, int64_t at, bool fp32) {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(table) + at * (fp32 ? 4 : 2));
    bits[0] = __ldg(from);
    if (fp32) bits[1] = __ldg(from + 1);
  }
  __device__ __forceinline__ void unpack(float (&out)[8], bool fp32) const {
    if (fp32) {
      memcpy(out, bits, 32);
    } else {
      const Chunk<Element, 8> narrow{bits[0]};
      narrow.unpack(out);
    }
  }
};

// Two chunks of eight columns of a row, on their way from memory, with their angles; pair `c` of D / 16. Halves: the
// two are turned against each other; interleaved: each in itself. All accesses lie on 16-byte borders.
template <typename Element>
struct Pairs {
  Chunk<Element, 8> a, b;
  Angles<Element> cosine, sine;

  // Where a pair lies. `turns`: whether the row has angles at all.
  struct Place {
    int first, second;  // columns
    bool turned;

    __device__ __forceinline__ Place(const Params& p, int c, bool turns = true)
        : turned(turns && c * 16 < p.rotary_dim) {
      const bool halves = turned && !p.interleaved;
      first = halves ? c * 8 : c * 16;
      second = first + (halves ? p.rotary_dim / 2 : 8);
    }
  };

  __device__ __forceinline__ void load(const Params& p, const Element* row, int b_, int t, int c, const Place& place) {
    load(p, row, b_ * p.cosine.batch + t * p.cosine.row + c * 8, b_ * p.sine.batch + t * p.sine.row + c * 8, place);
  }
  // The same from element `c` of the cosines and `s` of the sines.
  __device__ __forceinline__ void load(const Params& p, const Element* row, int64_t c, int64_t s, const Place& place) {
    a.load(row + place.first);
    b.load(row + place.second);
    if (!place.turned) return;
    cosine.load(p.cosine.data, c, p.angles_fp32);
    sine.load(p.sine.data, s, p.angles_fp32);
  }

  // BRANCH: by a branch where the compiler would work out both ways and choose; the general kernel has no registers for
  // that.
  template <bool BRANCH = false>
  __device__ __forceinline__ void turn(const Params& p, const Place& place) {
    if (!place.turned) return;
    float x[8], y[8], c[8], s[8];
    a.unpack(x);
    b.unpack(y);
    cosine.unpack(c, p.angles_fp32);
    sine.unpack(s, p.angles_fp32);
    const auto halves = [&](int i) {
      const Pair pair = rotate_pair(x[i], y[i], c[i], s[i]);
      x[i] = pair.x, y[i] = pair.y;
    };
    const auto neighbours = [&](int i) {
      float (&z)[8] = i < 4 ? x : y;
      const Pair pair = rotate_pair(z[2 * i % 8], z[2 * i % 8 + 1], c[i], s[i]);
      z[2 * i % 8] = pair.x, z[2 * i % 8 + 1] = pair.y;
    };
    if (!BRANCH) {
#pragma unroll
      for (int i = 0; i < 8; ++i) p.interleaved ? neighbours(i) : halves(i);
    } else if (__builtin_expect(p.interleaved, 0)) {
      asm volatile("// interleaved\n");
#pragma unroll
      for (int i = 0; i < 8; ++i) neighbours(i);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) halves(i);
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
