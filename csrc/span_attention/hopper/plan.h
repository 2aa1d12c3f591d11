// What one launch of the Hopper kernel is told: plain arithmetic over sizes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "span_attention/hopper/params.h"
#include "streamkernels/softmax.cuh"

namespace sk::span_attention::hopper {

constexpr int kRows = 128;               // of q that a block attends to at a time
constexpr int64_t kTogether = 32 << 20;  // bytes of keys and values that blocks read at a time, of an L2 of 50 MB

// What a launch gives its blocks.
struct Call {
  float* lse;
  const int2* bounds;
  const void* sink_logits;
  int* tickets;
  int H, group, T, S, N;  // group: query heads of a key head
  int blocks, items, together;
  float scale;  // times log2(e)
  bool sink_logits_fp32;
};

inline Call make_call(const Params& p, int* tickets) {
  Call c{};
  c.lse = p.lse;
  c.bounds = reinterpret_cast<const int2*>(p.bounds);
  c.sink_logits = p.sink_logits;
  c.sink_logits_fp32 = p.sink_logits_fp32;
  c.tickets = tickets;
  c.H = p.H, c.group = p.H / p.HK, c.T = p.T, c.S = p.S, c.N = p.N;
  c.scale = static_cast<float>(p.scale) * kLog2E;
  c.blocks = (p.T + kRows - 1) / kRows;
  const int64_t items = int64_t{p.B} * p.H * c.blocks;
  if (items > INT32_MAX / 2) throw std::invalid_argument("span_attention: q: too many rows for one launch");
  c.items = static_cast<int>(items);
  // key heads, a divisor of all, with their query heads
  const int key_heads = p.B * p.HK;
  int together = static_cast<int>(std::clamp<int64_t>(kTogether / (int64_t{4} * p.S * p.D), 1, key_heads));
  while (key_heads % together != 0) --together;
  c.together = together * c.group;
  return c;
}

}  // namespace sk::span_attention::hopper
