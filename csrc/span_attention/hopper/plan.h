// What one launch of the Hopper kernel is told: plain arithmetic over sizes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "span_attention/hopper/params.h"
#include "streamkernels/platform.h"
#include "streamkernels/softmax.cuh"

namespace sk::span_attention::hopper {

constexpr int kRows = 128;               // of q that a block attends to at a time
constexpr int64_t kTogether = 32 << 20;  // bytes of keys and values that blocks read at a time, of an L2 of 50 MB

// Quotients by what a launch knows: n / d for 0 <= n < 2^31 is what is left of n * multiplier, shifted (Granlund and
// Montgomery, 1994, "Division by invariant integers using multiplication", figure 4.1).
struct Divisor {
  uint32_t multiplier, shift;

  static Divisor of(int d) {
    uint32_t shift = 0;
    while ((int64_t{1} << shift) < d) ++shift;
    return {static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1), shift};
  }
  SK_HOST_DEVICE int quotient(int n) const {
    const uint32_t m = static_cast<uint32_t>(n);
    return static_cast<int>((static_cast<uint32_t>(uint64_t{m} * multiplier >> 32) + m) >> shift);
  }
};

// What a launch gives its blocks.
struct Call {
  float* lse;
  const int2* bounds;
  const void* sink_logits;
  int* tickets;
  int H, group, T, S, N;  // group: query heads of a key head
  int blocks, items, together;
  Divisor by_set, by_together, by_heads, by_group;  // together * blocks, together, H, group
  float scale;                                      // times log2(e)
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
  c.by_set = Divisor::of(c.together * c.blocks), c.by_together = Divisor::of(c.together);
  c.by_heads = Divisor::of(c.H), c.by_group = Divisor::of(c.group);
  return c;
}

}  // namespace sk::span_attention::hopper
