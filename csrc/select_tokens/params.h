// What one select_tokens launch needs. The arguments mean what streamkernels::select_tokens' schema says.
#pragma once

#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::select_tokens {

struct Params {
  Table scores;        // [B, K]
  Table index;         // int32 [B, K], or null: entry i is called i
  Table count;         // int32 [B], or null: all K take part
  int32_t* out;        // [B, width], contiguous
  int32_t* out_count;  // [B]
  float threshold;     // rounded to the dtype of the scores before it is compared
  bool thresholded;
  bool largest;
  int B, K;
  int limit;  // most entries that are kept, at most width
  int width;
};

void launch(const Params& params, DType dtype, int device, uintptr_t stream);
void preload(int device);

}  // namespace sk::select_tokens
