// What one token_scores launch needs. The arguments mean what streamkernels::token_scores' schema says.
#pragma once

#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::token_scores {

struct Params {
  Table q, o;   // [B, H, D]: the one query row and its output; `row` is the stride of a head
  Rows k, v;    // [B, HK, S, D]
  Table lse;    // fp32 [B, H]
  Table index;  // int32 [B, K]
  Table count;  // int32 [B]
  float* cosine;
  float* norm;
  float* mass;  // [B, K] each, contiguous
  int B, H, HK, S, D, K;
  float scale;
  float softcap;  // 0: none
};

void launch(const Params& params, DType dtype, int device, uintptr_t stream);
void preload(int device);

}  // namespace sk::token_scores
