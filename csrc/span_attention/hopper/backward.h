// The gradients of what the Hopper kernel makes: two launches, dq and the rows' statistics, then dk and dv.
#pragma once

#include "span_attention/hopper/params.h"

namespace sk::span_attention::hopper {

struct Backward {
  Params p;                                // q, k, v, lse, bounds, sink_logits, sizes, scale; lse contiguous
  Rows o, dout;                            // [B, H, T, D]
  const float* dlse;                       // [B, H, T], or null: zeros
  float* sink_gradient;                    // [B, H, T], what each row adds to d sink_logits; null without them
  void *dq, *dk, *dv;                      // stored rows first, contiguous
  const int32_t *row_blocks, *key_blocks;  // [B, TB, N, 4], [B, SB, 4] (prepare)
  float* work;                             // of `work_of`, on a 16-byte border
  int *tickets, *counters;  // [2], and as `work_of` says; zero, and zero again when the launches are complete
};

// Floats and counters that launches of such sizes need.
struct Work {
  int64_t floats, counters;
};
Work work_of(int B, int H, int HK, int T, int S, int D, int device);
// Takes what the forward takes, on the same devices (here).
void launch(const Backward& backward, DType dtype, int device, uintptr_t stream);
void preload_backward(int device);

}  // namespace sk::span_attention::hopper
