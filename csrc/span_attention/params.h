// What one span_attention launch needs. The arguments mean what streamkernels::span_attention's schema says.
#pragma once

#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::span_attention {

constexpr int kMaxSlots = 8;
enum Rule : int8_t { kAttend = 0, kMass = 1, kSink = 2, kKept = 3 };  // streamkernels/core/spans.py

struct Params {
  Rows q;                   // [B, H, T, D]
  Rows k, v;                // [B, HK, S, D]
  void* o;                  // [B, T, H, D], contiguous
  float* lse;               // [B, H, T]
  const int32_t* bounds;    // [B, T, N, 2], contiguous
  Table sink_key;           // int32 [B, N], or null
  Rows kept;                // int32 [B, HK, K]: `row` is the stride of an entry; or null
  Table kept_count;         // int32 [B, HK], or null: all K count
  const void* sink_logits;  // [H], or null
  bool sink_logits_fp32;    // else of q's dtype
  // with more than one split: sums fp32 [splits, B, H, T, D] and (top, sum) [splits, B, H, T, 2] of every split
  float* partial;
  float* parts;
  int B, H, HK, T, S, D, N, K;
  Rule rules[kMaxSlots];
  double scale, softcap;
};

// How many parts the keys of a row are cut into: `partial` and `parts` need room for as many when it is more than 1.
int splits(const Params& params, int device);
// `splits` is what splits() said.
void launch(const Params& params, int splits, DType dtype, int device, uintptr_t stream);
void preload(int device);

}  // namespace sk::span_attention
