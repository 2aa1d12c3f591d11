// How one span_attention launch is cut into blocks: plain arithmetic over sizes; spans are data on the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "span_attention/params.h"
#include "streamkernels/softmax.cuh"

namespace sk::span_attention {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 64;      // keys of a tile
constexpr int kRun = 16;       // keys that are not torn apart between splits
constexpr int kMaxStages = 3;  // tiles under way at a time
constexpr int kRing = 4;       // tiles whose key indices are in shared memory: more than kMaxStages
constexpr int kBlocksPerSm = 2;
constexpr int kMaxSplits = 64;
constexpr int kMaxDim = 256;
constexpr int kReserved = 1024;  // bytes of shared memory that each block costs beside its own

// Rows of q that share a kv head: t * R + r for the R query heads of it. A block takes `rows` of them.
struct Plan {
  int rows;  // 16: the warps share the rows and cut the keys; 64: each warp has 16 rows
  int tiles;
  int splits;
  int stages;
  int shared;  // bytes of dynamic shared memory
  Factors factors;
};

// What of the machine matters.
struct Machine {
  int multiprocessors;
  int shared_of_block, shared_of_processor;
};

// padded, so that eight rows of a matrix lie in different banks
SK_HOST_DEVICE constexpr int row_bytes(int D) {
  return 2 * D + 16;
}
SK_HOST_DEVICE constexpr int stage_bytes(int D) {
  return 2 * kKeys * row_bytes(D);
}
// shared memory that does not depend on the number of stages: q, and static memory
SK_HOST_DEVICE constexpr int fixed_bytes(int D, int rows) {
  return rows * row_bytes(D) + rows * kMaxSlots * 8 + kRing * kKeys * 4 + 512;
}

inline Plan make_plan(const Params& p, const Machine& machine) {
  Plan plan{};
  const int64_t rows = static_cast<int64_t>(p.T) * (p.H / p.HK);
  plan.rows = rows <= 16 ? 16 : 64;
  plan.tiles = static_cast<int>((rows + plan.rows - 1) / plan.rows);
  const int fixed = fixed_bytes(p.D, plan.rows);
  const int half = machine.shared_of_processor / kBlocksPerSm - kReserved;
  const auto fit = [&](int room) { return std::min(kMaxStages, (room - fixed) / stage_bytes(p.D)); };
  plan.stages = fit(std::min(half, machine.shared_of_block));
  int blocks_per_sm = kBlocksPerSm;
  if (plan.stages < 2) {
    plan.stages = std::max(1, fit(machine.shared_of_block));
    blocks_per_sm = 1;
  }
  plan.shared = plan.stages * stage_bytes(p.D) + plan.rows * row_bytes(p.D);
  // one wave of blocks, as long as each has a tile of keys
  int64_t keys = 0;
  for (int n = 0; n < p.N; ++n) keys += p.rules[n] == kKept ? std::min(p.K, p.S) : p.S;
  keys = std::min<int64_t>(keys, std::max(p.S, p.K));
  const int64_t blocks = static_cast<int64_t>(plan.tiles) * p.B * p.HK;
  const int64_t wanted = static_cast<int64_t>(blocks_per_sm) * machine.multiprocessors / std::max<int64_t>(1, blocks);
  const int64_t most = std::min<int64_t>(kMaxSplits, (keys + kKeys - 1) / kKeys);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  plan.factors = make_factors(p.scale, p.softcap);
  return plan;
}

}  // namespace sk::span_attention
