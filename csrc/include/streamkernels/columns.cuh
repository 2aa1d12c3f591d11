// The columns of a row of heads that one thread moves, and the rotation of them.
#pragma once

#include <cstdint>

#include "streamkernels/chunk.cuh"
#include "streamkernels/rope.cuh"
#include "streamkernels/tensor.h"

namespace sk {

template <typename Element>
__device__ __forceinline__ Element* at(const Rows& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<Element*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

// The two runs of N columns that one thread moves, and how it rotates them.
// Halves: run a is turned against run b. Interleaved with N > 1: each run holds whole pairs. The rest is copied.
template <int N, bool INTERLEAVED>
struct Columns {
  int a, b;              // first column of each run; b < 0: the row has no second run
  int angle_a, angle_b;  // first column of the angles; < 0: copied

  __device__ __forceinline__ Columns(int item, int items, int D, int rotary_dim) {
    if constexpr (INTERLEAVED && N > 1) {
      a = item * N;
      b = a + items * N;
      angle_a = a < rotary_dim ? a / 2 : -1;
      angle_b = b < rotary_dim ? b / 2 : -1;
    } else {
      const int pairs = rotary_dim / 2 / N;
      if (item < pairs) {
        angle_a = item * N;
        a = INTERLEAVED ? 2 * item : angle_a;
        b = INTERLEAVED ? a + 1 : angle_a + rotary_dim / 2;
      } else {
        angle_a = -1;
        a = rotary_dim + (item - pairs) * N;
        b = a + (items - pairs) * N;
      }
      angle_b = -1;
    }
    if (b >= D) b = -1;
  }
};

// Cosines and sines of one row for one thread's columns.
template <typename Element, int N, bool INTERLEAVED>
struct Angles {
  float cosine[N], sine[N];

  // c and s: where the row's cosines and sines begin in their tables, which are fp32 or of Element
  __device__ __forceinline__ void load(const void* cosines, const void* sines, int64_t c, int64_t s, bool fp32,
                                       const Columns<N, INTERLEAVED>& columns) {
    if constexpr (INTERLEAVED && N > 1) {
      constexpr int kHalf = N / 2;
      if (columns.angle_a >= 0) part<0, kHalf>(cosines, sines, c + columns.angle_a, s + columns.angle_a, fp32);
      if (columns.angle_b >= 0) part<kHalf, kHalf>(cosines, sines, c + columns.angle_b, s + columns.angle_b, fp32);
    } else {
      if (columns.angle_a >= 0) part<0, N>(cosines, sines, c + columns.angle_a, s + columns.angle_a, fp32);
    }
  }

 private:
  template <int FIRST, int COUNT>
  __device__ __forceinline__ void part(const void* cosines, const void* sines, int64_t cosine_at, int64_t sine_at,
                                       bool fp32) {
    float c[COUNT], s[COUNT];
    load_angles<Element, COUNT>(c, cosines, cosine_at, fp32);
    load_angles<Element, COUNT>(s, sines, sine_at, fp32);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      cosine[FIRST + i] = c[i];
      sine[FIRST + i] = s[i];
    }
  }
};

// Turns pairs that lie inside of one run.
template <typename Element, int N>
__device__ __forceinline__ void turn_inside(Chunk<Element, N>& run, const float* cosine, const float* sine) {
  float x[N];
  run.unpack(x);
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const Pair turned = rotate_pair(x[i], x[i + 1], cosine[i / 2], sine[i / 2]);
    x[i] = turned.x;
    x[i + 1] = turned.y;
  }
  run.pack(x);
}

// Turns the two runs of one row by its angles.
template <typename Element, int N, bool INTERLEAVED>
__device__ __forceinline__ void turn(Chunk<Element, N>& a, Chunk<Element, N>& b, const Columns<N, INTERLEAVED>& columns,
                                     const Angles<Element, N, INTERLEAVED>& angles) {
  if constexpr (INTERLEAVED && N > 1) {
    if (columns.angle_a >= 0) turn_inside(a, angles.cosine, angles.sine);
    if (columns.angle_b >= 0) turn_inside(b, angles.cosine + N / 2, angles.sine + N / 2);
  } else if (columns.angle_a >= 0) {
    float x[N], y[N];
    a.unpack(x);
    b.unpack(y);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Pair turned = rotate_pair(x[i], y[i], angles.cosine[i], angles.sine[i]);
      x[i] = turned.x;
      y[i] = turned.y;
    }
    a.pack(x);
    b.pack(y);
  }
}

}  // namespace sk
