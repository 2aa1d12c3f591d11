// How one token_scores launch is cut into blocks: plain arithmetic, tested on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "streamkernels/platform.h"
#include "token_scores/params.h"

namespace sk::token_scores {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = 4;         // rows of k and v that a group of lanes has under way at a time
constexpr int kBlocksPerSm = 16;  // blocks wanted: eight waves
constexpr int kMaxParts = kWarps * kSlots;

inline bool on_borders(const Params& p, int element_size) {
  return aligned(p.q, element_size) && aligned(p.o, element_size) && aligned(p.k, element_size) &&
         aligned(p.v, element_size);
}

// The plan for fp32. A row of k or v is read by a group of `lanes` lanes, 16 bytes each (twice where `chunks` is 2).
// The block has kMaxParts slots for each of its 32 / lanes groups; `parts` neighbouring slots share one key, each with
// every parts-th kv head.
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
  plan.vectors = on_borders(p, element_size);
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

constexpr int kTileKeys = 8, kTileHeads = 2, kTileQueries = 8;
constexpr int kTileColumns = 32;      // of one 16-byte access of four lanes
constexpr int kTileStepBytes = 2048;  // of one such access of a warp: k and v of all rows
constexpr int kMaxTileWarps = 16;     // of a block
constexpr int kUsualWarps = 4;        // of a block where keys are many
constexpr int kUsualPairs = 4;        // of a warp there
constexpr int kReserved = 3072;       // bytes of shared memory that a block takes besides

struct Machine {
  int processors, shared_of_block, shared_of_processor;
};

// The plan for fp16 and bf16. A warp walks pairs of kv heads of kTileKeys keys; `parts` neighbouring warps share one
// such tile of keys, each with every parts-th pair.
struct TilePlan {
  int parts;  // a power of two: 1 << shift
  int shift;
  int warps;          // of a block
  int keys;           // of a block at a time
  int blocks_of_row;  // of the batch: they take turns over its keys
  float inside;       // what a product is multiplied with before it is capped
  int64_t blocks;
  bool vectors;  // every row lies on a 16-byte border
};

// accesses of a row; the kernel has instances for these, that with most takes rows off 16-byte borders too
constexpr int kAnySteps = 8;
inline int tile_steps(int D, bool vectors) {
  return !vectors || D > 128 ? kAnySteps : D > 64 ? 4 : 2;
}
// bytes of a row of q or o in shared memory: rows that are read together lie in other banks
SK_HOST_DEVICE constexpr int tile_row_bytes(int steps) {
  return steps * kTileColumns * 2 + 64;
}
SK_HOST_DEVICE constexpr int tile_query_bytes(int H, int steps) {
  return 2 * H * tile_row_bytes(steps) + (H + 3) / 4 * 16;
}
inline int tile_shared(int H, int steps, int warps) {
  return tile_query_bytes(H, steps) + warps * steps * kTileStepBytes;
}

// As many blocks as run at once, with the same number of turns each; `plan` has its parts and warps.
inline void cut(TilePlan& plan, const Params& p, int steps, const Machine& machine) {
  plan.keys = plan.warps / plan.parts * kTileKeys;
  plan.inside = p.softcap > 0.0f ? p.scale / p.softcap : p.scale;
  const int64_t groups = (static_cast<int64_t>(p.K) - 1) / plan.keys + 1;
  const int together =
      std::max(1, std::min(machine.shared_of_processor / (tile_shared(p.H, steps, plan.warps) + kReserved),
                           kMaxTileWarps / plan.warps));
  const int64_t room = std::max<int64_t>(1, static_cast<int64_t>(together) * machine.processors / p.B);
  const int64_t turns = (groups - 1) / room + 1;
  plan.blocks_of_row = static_cast<int>((groups - 1) / turns + 1);
  plan.blocks = static_cast<int64_t>(plan.blocks_of_row) * p.B;
}

// `warps` is 0 if the query heads leave no room for one
inline TilePlan make_tile_plan(const Params& p, int steps, bool vectors, const Machine& machine) {
  TilePlan plan{};
  plan.vectors = vectors;
  int most = kMaxTileWarps / 2;
  while (most > 0 && tile_shared(p.H, steps, most) > machine.shared_of_block) most /= 2;
  if (most == 0) return plan;
  const int64_t tiles = p.B * ((static_cast<int64_t>(p.K) + kTileKeys - 1) / kTileKeys);
  const int64_t room = static_cast<int64_t>(kMaxTileWarps) * machine.processors;
  // few keys: spread the heads of a tile over warps, while all of them find room at once; many: leave each warp enough
  // of them, and the queries that a block has more than one tile
  const int pairs = (p.HK + kTileHeads - 1) / kTileHeads;
  const auto fits = [&](int parts) {
    const bool many = parts <= kUsualWarps && kUsualPairs * parts <= pairs;
    return parts <= most && parts < 2 * pairs && (many || parts * tiles <= room);
  };
  plan.parts = 1;
  while (fits(2 * plan.parts)) {
    plan.parts *= 2;
    ++plan.shift;
  }
  plan.warps = plan.parts;
  while (2 * plan.warps <= std::min(most, kUsualWarps) &&
         plan.parts * tiles >= int64_t{2} * plan.warps * machine.processors) {
    plan.warps *= 2;
  }
  cut(plan, p, steps, machine);
  return plan;
}

}  // namespace sk::token_scores
