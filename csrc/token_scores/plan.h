// How one token_scores launch is cut into blocks: plain arithmetic, tested on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "token_scores/params.h"

namespace sk::token_scores {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = 4;         // rows of k and v that a group of lanes has under way at a time
constexpr int kBlocksPerSm = 16;  // blocks wanted: eight waves
constexpr int kMaxParts = kWarps * kSlots;

// A row of k or v is read by a group of `lanes` lanes, 16 bytes each (twice where `chunks` is 2). The block has
// kMaxParts slots for each of its 32 / lanes groups; `parts` neighbouring slots share one key, each with every parts-th
// kv head.
struct Plan {
  int lanes, chunks;
  int parts;  // a power of two
  int keys;   // of a block
  int64_t tiles, blocks;
  bool vectors;  // every row lies on a 16-byte border
};

inline Plan make_plan(const Params& p, int element_size, int multiprocessors) {
  Plan plan{};
  const int accesses = p.D * element_size / 16;
  plan.lanes = accesses <= 8 ? 8 : accesses <= 16 ? 16 : 32;
  plan.chunks = accesses <= 32 ? 1 : 2;
  plan.vectors = aligned(p.q, element_size) && aligned(p.o, element_size) && aligned(p.k, element_size) &&
                 aligned(p.v, element_size);
  const auto cut = [&](int parts) {
    plan.parts = parts;
    plan.keys = kMaxParts / parts * (32 / plan.lanes);
    plan.tiles = (static_cast<int64_t>(p.K) + plan.keys - 1) / plan.keys;
    plan.blocks = plan.tiles * p.B;
  };
  cut(1);
  // few keys: spread the heads of a key over slots
  const int64_t wanted = static_cast<int64_t>(kBlocksPerSm) * multiprocessors;
  while (plan.parts < kMaxParts && plan.parts < p.HK && plan.blocks < wanted) cut(2 * plan.parts);
  return plan;
}

}  // namespace sk::token_scores
