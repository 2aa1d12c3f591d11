// The pieces of an online softmax (Milakov and Gimelshein, arXiv 1805.02867) in powers of two.
#pragma once

#include <cmath>

#include "streamkernels/platform.h"

namespace sk {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What scores are multiplied by. Without softcap: s = outer * x. With it: s = outer * tanh(inner * x).
struct Factors {
  float inner, outer;
  bool capped;
};

inline Factors make_factors(double scale, double softcap) {
  if (softcap > 0) return {static_cast<float>(scale / softcap), static_cast<float>(softcap) * kLog2E, true};
  return {1.0f, static_cast<float>(scale) * kLog2E, false};
}

#if defined(__CUDACC__)

// 2^x; 0 for -inf
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// tanh from one power, exact to a few ulp of 1: tanh.approx has 11 bits
__device__ __forceinline__ float tanh_of(float x) {
  const float e = __expf(-2.0f * fabsf(x));
  return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
}

// the score q k in powers of two
__device__ __forceinline__ float score_of(float x, const Factors& f) {
  return f.outer * (f.capped ? tanh_of(f.inner * x) : x);
}

#endif

// A part of a row's softmax: the largest score (in powers of two) and the sum of 2^(score - top). A sum of 0: nothing
// seen.
struct Part {
  float top, sum;
};

// what powers are taken against: a row that has seen nothing has no largest score
SK_HOST_DEVICE float finite_top(float top) {
  return top == -INFINITY ? 0.0f : top;
}

}  // namespace sk
