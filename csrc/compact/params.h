// What one compact launch needs: rows of x are gathered into y, which is contiguous.
#pragma once

#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::compact {

// x as [B, O, S, I, C]: samples, axes before the token axis, tokens, axes behind it, and the innermost axis. Strides in
// elements; any axis but B and S may be 1.
struct Params {
  const void* x;
  int64_t batch, outer, token, inner, column;
  void* y;      // [B, O, K, I, C]
  Table index;  // int32 [B, K]
  Table count;  // int32 [B]
  int B, O, S, I, C, K;
};

// Gathers on `stream` of `device`; an element has `size` bytes (1, 2, 4, 8 or 16).
void launch(const Params& params, int size, int device, uintptr_t stream);
void preload(int device);

}  // namespace sk::compact
