// How one launch is cut into blocks: plain arithmetic, tested on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rotate_append/params.h"

namespace sk::rotate_append {

constexpr int kThreads = 128;        // most threads of a block
constexpr int kMaxTile = 1024;       // most rows of a block: their places are kept in shared memory
constexpr int kBlocksThatFit = 5;    // of kThreads on a multiprocessor: caps the registers of a thread
constexpr int kBlocksPerSm = 10;     // blocks wanted: two waves
constexpr int kRolesPerByte = 16;    // bytes moved by a block for every byte of `role` that it may have to count
constexpr int kHeadsInFlight = 2;    // heads whose loads are issued together, 16-byte path
constexpr int kScalarsInFlight = 4;  // the same, one element at a time

// A block appends rows [tile * rows, +rows) of one batch row for heads [group * heads, +heads). A thread owns two runs
// of `width` columns of k and v (an item) and walks over rows and heads.
struct Plan {
  int items;    // threads per row: ceil(D / width / 2)
  int threads;  // of a block, a multiple of 32
  int rows;     // of a block
  int heads;    // of a block
  int tiles, groups;
  int64_t blocks;
};

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Columns that a thread moves with one access: 16 bytes when every access lies on its border and no run straddles the
// end of the rotated columns, else one.
inline int access_width(const Params& p, int element_size) {
  const int width = 16 / element_size;
  const int run = p.interleaved ? p.rotary_dim : p.rotary_dim / 2;
  const int angle_size = p.angles_fp32 ? 4 : element_size;
  const bool angles = p.rotary_dim == 0 || (aligned(p.cosine, angle_size) && aligned(p.sine, angle_size));
  const bool source =
      p.source_capacity == 0 || (aligned(p.source_k, element_size) && aligned(p.source_v, element_size));
  const bool target =
      p.target_capacity == 0 || (aligned(p.target_k, element_size) && aligned(p.target_v, element_size));
  const bool chunk = aligned(p.k, element_size) && aligned(p.v, element_size);
  return p.D % width == 0 && run % width == 0 && angles && source && target && chunk ? width : 1;
}

inline Plan make_plan(const Params& p, int width, int element_size, int multiprocessors) {
  const int B = p.B, HK = p.HK, T = p.T, D = p.D;
  Plan plan{};
  plan.items = ceil_div(D / width, 2);
  plan.rows = std::min(T, std::max(1, kThreads / plan.items));
  plan.threads = std::min(kThreads, ceil_div(plan.rows * plan.items, 32) * 32);
  plan.heads = HK;
  const auto blocks = [&](int rows, int heads) {
    return static_cast<int64_t>(B) * ceil_div(T, rows) * ceil_div(HK, heads);
  };
  // few rows: spread the heads over blocks
  const int64_t wanted = static_cast<int64_t>(kBlocksPerSm) * multiprocessors;
  while (plan.heads > 1 && blocks(plan.rows, plan.heads) < wanted) plan.heads = ceil_div(plan.heads, 2);
  if (p.role != nullptr) {
    // a block counts the roles of all rows before it: with long T give it more work, while enough blocks remain
    const auto moved = [&] { return 4.0 * plan.rows * plan.heads * D * element_size; };
    const int64_t enough = 3 * static_cast<int64_t>(multiprocessors);
    while (moved() < static_cast<double>(kRolesPerByte) * T) {
      const int heads = std::min(HK, 2 * plan.heads), rows = std::min({kMaxTile, T, 2 * plan.rows});
      if (heads > plan.heads && blocks(plan.rows, heads) >= enough) {
        plan.heads = heads;
      } else if (rows > plan.rows && blocks(rows, plan.heads) >= enough) {
        plan.rows = rows;
      } else {
        break;
      }
    }
  }
  plan.tiles = ceil_div(T, plan.rows);
  plan.groups = ceil_div(HK, plan.heads);
  plan.blocks = blocks(plan.rows, plan.heads);
  return plan;
}

}  // namespace sk::rotate_append
