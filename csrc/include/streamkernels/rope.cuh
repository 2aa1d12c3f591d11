// Rotary position embedding of one pair (RoFormer, arXiv 2104.09864, eq. 34).
#pragma once

#include <cmath>

#include "streamkernels/platform.h"

namespace sk {

struct Pair {
  float x, y;
};

// (x, y) turned by the angle whose cosine and sine are given, in fp32. The fused form is spelt out so that every code
// path and every compiler gives the same bits.
SK_HOST_DEVICE Pair rotate_pair(float x, float y, float cosine, float sine) {
  return {fmaf(x, cosine, -(y * sine)), fmaf(y, cosine, x * sine)};
}

}  // namespace sk
